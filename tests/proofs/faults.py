"""Data under faults: kill -9 in the middle of every stage, S3 that answers with errors, a disk that is full.

    python -m tests.proofs.faults --store DIR [--minutes 55] [--seed 0] [--docs docs]

The `tiny` recipe makes its data on a Ray cluster of three nodes on this machine (a head that takes no work, two with a
CPU each), over and over, in a folder and in a real S3 server, and is disturbed at a step drawn from the seed
(tests/fixtures/held: in whatever process does the stage):

    driver    killed in each stage in turn, and the same command given again
    worker    the one that does the stage is killed; where the driver does it, another one
    node      all processes of the node that does the stage are killed at once, and an empty node joins
    answers   an eighth of all requests to S3 fail: 500, 503, reset, cut in the middle, answer lost; some stall
    disk      the store's disk has room for a part of the data; a part more each time the run said so

At the end of each, all records and manifests are byte-identical to those of an undisturbed run, `data verify` is clean,
and each row of the list is there once. A round is every disturbance once; rounds go on until the minutes are over, and
a proof that was stopped goes on behind the last that it finished (DIR/rounds.jsonl).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from infra.records.manifest import Record
from infra.store.opening import open_store
from tests.fixtures.faulty_s3 import Fault, Plan, Request, at_random, unharmed
from tests.fixtures.holding import Step
from tests.proofs.faults_scene import EARLY, LATE, STAGES, TARS, Part, Scene, check, documents, kill, scene

SHARE = 1 / 8
BEGIN, END = "<!-- faults -->", "<!-- /faults -->"
VICTIMS = ("driver", "worker", "node")
Done = dict[str, Any]
"""A line of rounds.jsonl."""


def steps(scene: Scene, kind: str, part: Part) -> dict[str, list[Step]]:
    """The steps of each stage of a part in an undisturbed run on that kind of store, which is made when first asked
    for, and that its data are those of the undisturbed run in a folder."""
    told = scene.folder / f"steps-{kind}-{part.name}.json"
    if not told.exists():
        scene.holding.arm({})
        scene.finish(scene.gathered if part is TARS else scene.whole, part)
        uri = scene.new(kind, part)
        scene.holding.arm({}, write=True)
        scene.finish(uri, part)
        found = scene.holding.steps()
        check(scene, uri, part)
        scene.remove(uri)
        told.write_text(json.dumps(found))
    return json.loads(told.read_text())


def killed(scene: Scene, kind: str, part: Part, victim: str, draw: random.Random) -> Done:
    """One kill in each stage."""
    known = steps(scene, kind, part)
    uri = scene.new(kind, part)
    hit, again = kill(scene, uri, part, victim, known, draw)
    left = check(scene, uri, part)
    scene.remove(uri)
    return {"hit": hit, "again": again, "orphans": left}


def answers(scene: Scene, seed: int) -> tuple[Plan, Callable[[], Counter[Fault]]]:
    """The plan of a server that fails in an eighth of all requests; stalls, which cost a minute each, are rare."""
    often = at_random(seed, SHARE, [fault for fault in Fault if fault is not Fault.STALL])
    seldom = at_random(seed + 1, SHARE / 100, [Fault.STALL])
    before = scene.proxy.happened.copy()

    def plan(request: Request) -> Fault | None:
        return seldom(request) or often(request)

    return plan, lambda: scene.proxy.happened - before


def answered(scene: Scene, part: Part, draw: random.Random) -> Done:
    """A run on S3 that fails again and again, to its end."""
    steps(scene, "s3", part)
    uri, again, code = scene.new("s3", part), -1, 5
    scene.proxy.plan, happened = answers(scene, draw.randrange(1 << 30))
    scene.holding.arm({})
    try:
        while code:
            again += 1
            code = scene.finish(uri, part, codes=(0, 5))
    finally:
        scene.proxy.plan = unharmed
    return {"faults": happened(), "again": again, "orphans": check(scene, uri, part)}


def crowded(scene: Scene, part: Part, draw: random.Random) -> Done:
    """A run on a disk that grows by a tenth to a third of the data whenever the run says that it is full."""
    steps(scene, "folder", part)
    root, again, code = scene.folder / "disk", -1, 5
    uri = str(root / "store")
    root.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "unclip-proof", root], check=True)
    try:
        scene.give(open_store(uri), part)
        room = shutil.disk_usage(root).used
        whole = open_store(scene.whole, create=False)
        records = documents(whole, part.stages).values()
        data = sum(file.bytes for one in records if b'"files"' in one for file in Record.from_json(one).files.values())
        scene.holding.arm({})
        while code:
            again += 1
            room += int(data * draw.uniform(0.1, 0.3))
            subprocess.run(["mount", "-o", f"remount,size={room}", root], check=True)
            code = scene.finish(uri, part, codes=(0, 5))
            if code and "No space left on device" not in scene.log.read_text():
                raise SystemExit(f"a full disk was told as\n{scene.log.read_text()[-3000:]}")
        return {"again": again, "orphans": check(scene, uri, part)}
    finally:
        subprocess.run(["umount", "--lazy", root], check=True)


def disturbances(scene: Scene) -> dict[str, Callable[[random.Random], Done]]:
    """All of a round, by the names that they have in rounds.jsonl; what takes long comes last."""
    found: dict[str, Callable[[random.Random], Done]] = {}
    for part in (EARLY, LATE):
        for kind in ("folder", "s3"):
            for victim in VICTIMS:
                found[f"{part.name} {kind} {victim}"] = partial(killed, scene, kind, part, victim)
        found[f"{part.name} answers"] = partial(answered, scene, part)
        found[f"{part.name} disk"] = partial(crowded, scene, part)
        if part is EARLY:
            for victim in VICTIMS:
                found[f"tars folder {victim}"] = partial(killed, scene, "folder", TARS, victim)
    return found


def done(folder: Path) -> list[Done]:
    """What was finished, by this process or one before."""
    path = folder / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def prove(folder: Path, minutes: float, seed: int) -> None:
    """Plays what is not there yet of one round after another until the time is over."""
    until = time.monotonic() + 60 * minutes
    with scene(folder) as stage:
        plays = disturbances(stage)
        for number in itertools.count():
            finished = {(line["round"], line["name"]) for line in done(folder)}
            for name, play in plays.items():
                if (number, name) in finished:
                    continue
                if time.monotonic() > until:
                    return
                began = time.monotonic()
                line = play(random.Random(f"{seed} {number} {name}"))
                line |= {"round": number, "name": name, "seconds": round(time.monotonic() - began)}
                with (folder / "rounds.jsonl").open("a") as out:
                    out.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)


def page(lines: Sequence[Done]) -> str:
    """What was found, as the section of docs/proofs.md."""
    columns = [(kind, victim) for kind in ("folder", "s3") for victim in VICTIMS]
    hits, gathered = Counter[tuple[str, str, str]](), Counter[str]()
    for line in lines:
        part, kind, victim = [*line["name"].split(), ""][:3]
        for stage, count in line.get("hit", {}).items():
            if part == TARS.name:
                gathered[victim] += count
            else:
                hits[kind, victim, stage] += count
    rows = ["| stage | " + " | ".join(f"{victim}, {kind}".replace("s3", "S3") for kind, victim in columns) + " |"]
    rows.append("|---" * (1 + len(columns)) + "|")
    for stage in STAGES:
        cells = [str(hits[kind, victim, stage]) for kind, victim in columns]
        rows += [f"| {stage} | {' | '.join(cells)} |"]
    faults = sum((Counter(line["faults"]) for line in lines if "faults" in line), Counter[str]())
    told = ", ".join(f"{count} {fault}" for fault, count in sorted(faults.items()))
    named = {what: [line for line in lines if line["name"].endswith(what)] for what in ("answers", "disk")}
    again = {what: sum(line["again"] for line in found) for what, found in named.items()}
    before = (
        f"{hits.total() + gathered.total()} kills (`kill -9`), by the stage in whose midst they came, victim and "
        "store; a node dies with all of its processes:"
    )
    behind = (
        f"Over tars that are there (source, gather), in a folder: {gathered['driver']} of a driver, "
        f"{gathered['worker']} of a worker, {gathered['node']} of a node. S3 that fails: {len(named['answers'])} runs "
        f"met {faults.total()} faults ({told or 'none yet'}) and were started again {again['answers']} times. A disk "
        f"that is full: {len(named['disk'])} runs were told so {again['disk']} times, code 5 and a paragraph each. At "
        f"the end of each of these {len(lines)} disturbed runs all records and manifests were byte-identical to those "
        "of an undisturbed run, `unclip data verify` was clean, and each row was there once. Objects that nothing "
        f"refers to: {sum(line['orphans'] for line in lines)} in all stores together, for `unclip data gc`."
    )
    return "\n".join([before, "", *rows, "", behind])


def write(docs: Path, text: str) -> None:
    """Puts the section between its marks in docs/proofs.md."""
    path = docs / "proofs.md"
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a folder for stores and for what was finished")
    parser.add_argument("--minutes", type=float, default=55)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docs", type=Path, help="the folder whose proofs.md is written")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends what it started
    prove(arguments.store, arguments.minutes, arguments.seed)
    if arguments.docs:
        write(arguments.docs, page(done(arguments.store)))
