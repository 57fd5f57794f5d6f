"""A fit on a real Ray cluster that loses a node and gets another: three workers, two, three again.

    python -m tests.proofs.elastic --out DIR [--minutes 50] [--only NAME]

Three nodes of one CPU each, beside a head, on this machine. At a moment of its own (between two micro-batches, at an
epoch's edge, while a checkpoint is written) a worker stops, and all processes of its node are killed at once. Ray Train
goes on with two workers; then a node joins, and it goes on with three. The model is whole on every worker (flat), or in
shards (fsdp). What is compared with an undisturbed fit by one worker in one process: the uids of every micro-batch,
also of those that were done twice, which must be equal; metrics by step and the released model, to `CLOSE`. How many
workers there were, one after the other, they note themselves.

A cell that is done (DIR/<cell>.json) is not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from infra.store.local import LocalStore
from tests.fixtures.holding import ROOT
from tests.fixtures.nodes import Nodes, nodes
from tests.proofs.elastic_watch import FIRST, Watch, places
from tests.proofs.interrupt import MOMENTS, TIMED, Outcome, difference, edges_of, job_of
from training import launch
from training.job import FitHow, Job
from unclip.files import read_tensors

STEPS = 160
PATIENCE_S = 300.0


def said(folder: Path) -> Iterator[dict[str, Any]]:
    """All that workers noted, in the order of time."""
    lines = [line for path in folder.glob("seen-*.jsonl") for line in path.read_text().splitlines()]
    return iter(sorted((json.loads(line) for line in lines if line.endswith("}")), key=lambda line: line["time"]))


def worlds(folder: Path) -> list[int]:
    """How many workers there were, one after the other."""
    return [ranks for ranks, _ in groupby(line["ranks"] for line in said(folder) if "ranks" in line)]


def outcome(folder: Path, out: Path, job: Job) -> Outcome:
    """What a finished fit gave; what was done twice must have seen the same twice."""
    names = places(job)
    uids: dict[tuple[int, int], list[str]] = {}
    metrics: dict[int, dict[str, float]] = {}
    for line in said(folder):
        if "uids" in line:
            place = names[line["seed"]]
            if uids.setdefault(place, line["uids"]) != line["uids"]:
                raise SystemExit(f"{folder.name}: step {place[0]}, lane {place[1]} saw other samples the second time")
        else:
            metrics[line["step"]] = {
                name: value for name, value in line["values"].items() if not name.startswith(TIMED)
            }
    if len(uids) != STEPS * job.config.lanes:
        raise SystemExit(f"{folder.name}: {len(uids)} micro-batches were seen, of {STEPS * job.config.lanes}")
    return Outcome(read_tensors(out / "model.safetensors"), metrics, uids)


def until(true: Callable[[], object]) -> None:
    """Waits; raises TimeoutError."""
    end = time.monotonic() + PATIENCE_S
    while not true():
        if time.monotonic() > end:
            raise TimeoutError("the fit did not come to where the proof waits for it")
        time.sleep(0.1)


def disturb(cluster: Nodes, folder: Path) -> None:
    """Kills the node of the worker that was struck; adds one once two went on; lets the fit run once three do."""
    try:
        until((folder / "struck").exists)
        node = cluster.of(int((folder / "struck").read_text()))
        if node is None:
            raise ValueError("the worker that was struck is of no node")
        cluster.kill(node)
        until(lambda: worlds(folder)[-1:] == [2])
        cluster.add()
        until(lambda: worlds(folder)[-1:] == [3])
    finally:
        (folder / "fast").touch()  # so that the fit ends, whatever happened


def prove(out: Path, minutes: float, only: str) -> str:
    """Does the cells that are not done yet, while there is time; returns what was shown, in a sentence."""
    began, base = time.monotonic(), out / "base"
    shutil.rmtree(base, ignore_errors=True)
    made = job_of(base)
    job = replace(made, train={**made.train, "steps": STEPS})
    how = FitHow(least_workers=2, workers=3, checkpoint_seconds=0, log_seconds=0, system_seconds=0, preview_share=0)
    launch.RESIZE_SECONDS = 5.0
    alone = out / "alone"
    shutil.rmtree(alone, ignore_errors=True)
    (alone / "seen").mkdir(parents=True)
    watch = Watch(alone / "seen", replace(job, key="alone"), "", -1)
    (watch.folder / "fast").touch()
    watch.__setstate__(vars(watch))
    launch.train_local(watch.job, replace(how, workers=1, least_workers=0), LocalStore(base), alone, watch)
    expected = outcome(watch.folder, alone, watch.job)
    grid = [f"{shard}-{moment}" for moment in MOMENTS for shard in ("flat", "fsdp")]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with nodes(3, environment) as cluster, contextlib.ExitStack() as connected:
        import ray  # which reads the token that the cluster has drawn

        ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
        connected.callback(ray.shutdown)  # before the cluster ends, which would end this process without a word
        for cell in grid:
            if only not in cell or (out / f"{cell}.json").exists() or time.monotonic() - began > 60 * minutes:
                continue
            shard, moment = cell.split("-")
            step = edges_of(LocalStore(base), job)[0] if moment == "epoch" else FIRST
            folder = out / cell
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            one = replace(job, key=cell)
            disturber = threading.Thread(target=disturb, args=(cluster, folder))
            disturber.start()
            start = time.monotonic()
            told = Watch(folder, one, moment, step)
            launch.fit(one, replace(how, shard=shard, max_failures=9), str(base), folder, told, 1)
            disturber.join()
            if worlds(folder) != [3, 2, 3]:
                raise SystemExit(f"{cell}: workers were {worlds(folder)}, and should have been 3, 2 and 3")
            largest = difference(outcome(folder, folder, one), expected, exact=False)
            seconds = round(time.monotonic() - start)
            (out / f"{cell}.json").write_text(json.dumps({"difference": largest, "seconds": seconds}))
            print(f"{cell}: workers 3, 2, 3; uids equal, numbers within {largest:.1e}; {seconds} s", flush=True)
    done = [json.loads(path.read_text()) for cell in grid if (path := out / f"{cell}.json").exists()]
    most = max((cell["difference"] for cell in done), default=0.0)
    return f"{len(done)} of {len(grid)} cells: uids equal, the largest difference of a number {most:.1e}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the store and for what was found")
    parser.add_argument("--minutes", type=float, default=50, help="begin no cell after so long")
    parser.add_argument("--only", default="", help="only cells with this in their names")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(prove(arguments.out.resolve(), arguments.minutes, arguments.only))
