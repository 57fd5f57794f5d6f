"""A million rows in bounded memory: peak memory of every command at 100,000 and at 1,000,000 rows, and their ratio.

    python -m tests.proofs.million --out DIR [--rows 100000 1000000]

Each command is a process of its own, and its peak the kernel's high-water mark of resident memory (VmHWM), Ray's
workers beside it. The network is not the subject, and CLIP is none: `download` and `embed` are made here, through the
project's own code, from pictures and vectors that are drawn; their records are what the stages would have left. What is
done is not done again, so that a proof that was stopped goes on; figures lie in DIR/figures.json.

--no-pictures draws hashes instead of pictures, and makes the looks here too, without Ray: tars are empty, and the two
maps over single shards are not measured. It takes a third of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.proofs.million_data import CHANGED, make, write_list, write_recipe

MOST = 1.3
"""What the peak at the most rows may be, over that at the fewest."""


def steps(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Name → the command that is measured, in their order; nothing for what is made here."""
    drawn = (folder / "no-pictures").exists()
    recipe, store = str(folder / "recipe.yaml"), ["--store", str(folder / "store")]
    yield "plan, before anything", ["plan", recipe, *store]
    yield "source", ["run", recipe, "--until", "source", *store]
    yield "download", []
    for name in ("filter-look", "filter"):
        yield name, [] if drawn and "look" in name else ["run", recipe, "--until", name, *store]
    yield "clip", []
    yield "embed", []
    for name in ("curate-look", "curate"):
        yield name, [] if drawn and "look" in name else ["run", recipe, "--until", name, *store]
    yield "run, nothing to do", ["run", recipe, "--until", "curate", *store]
    yield "plan, all data there", ["plan", recipe, *store]
    other = ["--set", f"source.urls={folder / 'other.parquet'}"]
    yield "source of another list", ["run", recipe, "--until", "source", *other, *store]
    yield "data ls", ["data", "ls", *store]
    yield "data show", ["data", "show", "DOWNLOAD", *store]
    yield "data verify", ["data", "verify", *store]
    yield "data diff", ["data", "diff", "SOURCE", "OTHER", "--rows", str(folder / "rows.parquet"), *store]
    yield "data gc", ["data", "gc", *store]


def named(folder: Path, command: list[str]) -> list[str]:
    """The command with versions in the place of DOWNLOAD, SOURCE and OTHER."""
    if not {"DOWNLOAD", "SOURCE", "OTHER"} & {*command}:
        return command
    found: dict[str, list[str]] = {}
    for head in sorted((folder / "store" / "manifests").rglob("*.json"), key=lambda path: path.stat().st_mtime):
        found.setdefault(head.parent.parent.name.rsplit("-", 1)[0], []).append(head.name.partition(".")[0])
    names = {"DOWNLOAD": found["download"][-1], "SOURCE": found["source"][0], "OTHER": found["source"][-1]}
    return [names.get(word, word) for word in command]


def measured(command: list[str], log: Path) -> dict[str, Any]:
    """Runs `unclip COMMAND` and returns its seconds, peak memory and that of Ray's largest worker, in MiB."""
    began, workers, ended = time.monotonic(), [0], threading.Event()
    told = log.with_suffix(".json")
    with log.open("wb") as out:
        child = [sys.executable, "-m", "tests.proofs.million", "--inside", str(told), *command]
        process = subprocess.Popen(child, stdout=out, stderr=out)
        watch = threading.Thread(target=_watch, args=(process.pid, workers, ended))
        watch.start()
        code = process.wait()
        ended.set()
        watch.join()
    if code:
        raise SystemExit(f"unclip {' '.join(command)} exited with {code}: {log.read_text()[-3000:]}")
    seconds = time.monotonic() - began
    return {"peak": json.loads(told.read_text())["peak"], "workers": workers[0], "seconds": round(seconds, 1)}


def _watch(root: int, most: list[int], ended: threading.Event) -> None:
    """Notes the largest VmHWM of Ray's workers below a process, which rises only."""
    while not ended.wait(0.5):
        parents: dict[int, int] = {}
        marks: dict[int, int] = {}
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            except (OSError, ValueError):
                continue  # it has just ended
            parents[int(fields["Pid"])] = int(fields["PPid"])
            if fields["Name"].strip().startswith("ray::"):
                marks[int(fields["Pid"])] = int(fields.get("VmHWM", "0 kB").split()[0]) // 1024
        for pid, mark in marks.items():
            above = pid
            while above > 1 and above != root:
                above = parents.get(above, 0)
            if above == root:
                most[0] = max(most[0], mark)


def inside(told: Path, command: list[str]) -> None:
    """`unclip COMMAND` in this process, then its own high-water mark."""
    from pipelines.cli.main import main

    sys.argv = ["unclip", *command]
    try:
        main()
    finally:
        with open("/proc/self/status") as status:
            peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
        told.write_text(json.dumps({"peak": peak // 1024}))


def prove(out: Path, sizes: Sequence[int], pictures: bool) -> dict[str, dict[str, dict[str, Any]]]:
    """Step → rows → figures, of all steps at all sizes."""
    place = out / "figures.json"
    figures: dict[str, dict[str, dict[str, Any]]] = json.loads(place.read_text()) if place.exists() else {}
    for rows in sizes:
        folder = out / str(rows)
        folder.mkdir(parents=True, exist_ok=True)
        if not pictures:
            (folder / "no-pictures").touch()
        if not (folder / "recipe.yaml").exists():
            write_list(folder / "list.parquet", rows)
            write_list(folder / "other.parquet", rows, CHANGED)
            write_recipe(folder)
        for name, command in steps(folder):
            if str(rows) in figures.get(name, {}):
                continue
            if command:
                log = folder / f"{name.replace(' ', '-').replace(',', '')}.log"
                figure = measured(named(folder, command), log)
            else:
                began = time.monotonic()
                subprocess.run([sys.executable, "-m", "tests.proofs.million", "--make", name, str(folder)], check=True)
                figure = {"seconds": round(time.monotonic() - began, 1)}
            figures.setdefault(name, {})[str(rows)] = figure
            place.write_text(json.dumps(figures, indent=1))
            print(f"{rows} rows, {name}: {figure}", flush=True)
    return figures


def table(figures: dict[str, dict[str, dict[str, Any]]], sizes: Sequence[int]) -> tuple[list[str], float]:
    """The figures as lines of Markdown, and the largest ratio."""
    few, many = str(min(sizes)), str(max(sizes))
    lines = [f"| command | MiB at {few} rows | at {many} | ratio | Ray's worker | seconds |", "|---" * 6 + "|"]
    worst = 0.0
    for name, by_rows in figures.items():
        if "peak" not in by_rows[few]:
            continue
        ratio = by_rows[many]["peak"] / by_rows[few]["peak"]
        worst = max(worst, ratio)
        workers = " → ".join(str(by_rows[size]["workers"] or "–") for size in (few, many))
        if by_rows[few]["workers"]:
            worst = max(worst, by_rows[many]["workers"] / by_rows[few]["workers"])
        seconds = " → ".join(f"{by_rows[size]['seconds']:.0f}" for size in (few, many))
        lines.append(
            f"| {name} | {by_rows[few]['peak']} | {by_rows[many]['peak']} | {ratio:.2f} | {workers} | {seconds} |"
        )
    return lines, worst


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(Path(sys.argv[2]), sys.argv[3:])
    elif sys.argv[1:2] == ["--make"]:
        make(Path(sys.argv[3]), sys.argv[2])
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--out", type=Path, required=True, help="a folder for lists, stores and figures")
        parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
        parser.add_argument("--no-pictures", action="store_true", help="draw hashes instead; without Ray")
        arguments = parser.parse_args()
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{arguments.out.absolute()}/mlflow.db")
        lines, worst = table(prove(arguments.out, arguments.rows, not arguments.no_pictures), arguments.rows)
        print("\n".join(lines))
        if worst > MOST:
            raise SystemExit(f"peak memory grew to {worst:.2f} times, more than {MOST}")
