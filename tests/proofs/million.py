"""A million rows in bounded memory: peak memory of every command at 100,000 and at 1,000,000 rows, and their ratio.

    python -m tests.proofs.million --out DIR [--rows 100000 1000000]

Each command is a process of its own, and its peak the kernel's high-water mark of resident memory (VmHWM), Ray's
workers beside it. The network is not the subject, and CLIP is none: `download` and `embed` are made here, through the
project's own code, from pictures and vectors that are drawn; their records are what the stages would have left. What is
done is not done again, so that a proof that was stopped goes on; figures lie in DIR/figures.json.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

MOST = 1.3
"""What the peak at the most rows may be, over that at the fewest."""
SHARD = 1000
CHANGED = 0.01
"""Share of rows that the second list has others of, for `data diff`."""
RULES = {
    "filter": [
        {"rule": "size", "min_side": 8},
        {"rule": "caption", "min_words": 2},
        {"rule": "blocked_terms", "terms": ["blocked", "not this"]},
        {"rule": "exact_duplicates"},
        {"rule": "near_duplicates"},
    ],
    "curate": [{"rule": "caption", "min_words": 3}, {"rule": "clip_score", "top_fraction": 0.5}],
}
DATA = ("source", "download", "filter-look", "filter", "clip", "embed", "curate-look", "curate")


def write_recipe(folder: Path) -> Path:
    """The tiny recipe over our list, with every rule that decides over all rows."""
    import yaml

    from pipelines import recipe as recipes

    said = yaml.safe_load((recipes.FOLDER / "tiny.yaml").read_text())
    del said["world"], said["download"]["resolve"], said["evaluate"]
    said["download"]["format"] = "jpg"
    said["source"] = {"urls": str(folder / "list.parquet"), "rows_per_shard": SHARD}
    said["evaluate"] = {"prompts": "prompts.jsonl"}
    for group, rules in RULES.items():
        said[group] = {"rules": rules}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


def write_list(path: Path, rows: int, changed: float = 0.0) -> None:
    """A list of that many pairs; a few captions are short, blocked, or (changed) others than in the first list."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("url", pa.string()), ("caption", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 50_000):
            numbers = range(start, min(rows, start + 50_000))
            drawn = np.random.default_rng(start).random((2, len(numbers)))
            words = ["one" if luck < 0.02 else "a blocked word here" if luck < 0.04 else f"a picture of the thing {number}"
                     for number, luck in zip(numbers, drawn[0], strict=True)]  # fmt: skip
            words = [f"{word} anew" if luck < changed else word for word, luck in zip(words, drawn[1], strict=True)]
            urls = [f"https://pictures.test/{number % 977}/{number}.jpg" for number in numbers]
            writer.write_table(pa.table([urls, words], schema=schema))


def picture(number: int) -> bytes:
    """The picture of that number, a small JPEG: one in twenty equals an earlier one, twice as many nearly do."""
    from PIL import Image

    drawn = hashlib.blake2b(f"luck {number}".encode(), digest_size=16).digest()
    luck, earlier = drawn[0] / 256, int.from_bytes(drawn[1:8], "big") % (number + 1)
    pixels = hashlib.blake2b(f"{earlier if luck < 0.15 else number}".encode()).digest()
    shown = Image.frombytes("L", (8, 8), pixels).resize((16, 16), Image.Resampling.NEAREST)
    if 0.05 <= luck < 0.15:
        shown.putpixel((number % 16, 3), 128)
    out = io.BytesIO()
    shown.save(out, "JPEG", quality=95)
    return out.getvalue()


def job(folder: Path) -> Any:
    """The recipe joined with its store."""
    from pipelines.run import prepared

    return prepared(str(folder / "recipe.yaml"), str(folder / "store"), (), create=True)


def resolved(folder: Path, wanted: str) -> tuple[Any, Any, Any]:
    """(store, stage, what there is of it) of a stage whose inputs are all there."""
    from pipelines.graph import order, resolve

    with job(folder) as found:
        known: dict[str, Any] = {}
        for stage in order(found.stages):
            if all(need in known for need in stage.needs):
                there = resolve(stage, [known[need] for need in stage.needs], found.store)
                if stage.name == wanted:
                    return found.store, stage, there
                if not there.todo:
                    known[stage.name] = there.manifest()
    raise SystemExit(f"{wanted} is not to be resolved in {folder}")


def make(folder: Path, wanted: str) -> None:
    """Makes a stage's records in two processes, and its manifest."""
    store, _, there = resolved(folder, wanted)
    work = {"download": packed, "embed": embedded, "clip": clip}[wanted]
    with ProcessPoolExecutor(2) as pool:
        size = 2 * SHARD // 100
        todo = [(store.uri, action) for action in there.todo]
        made = [one for some in pool.map(work, [todo[at : at + size] for at in range(0, len(todo), size)]) for one in some]
    there.manifest(made).save(store)


def packed(todo: Sequence[tuple[str, Any]]) -> list[Any]:
    """Shards of download, written by pipelines/pack.py."""
    import pyarrow.parquet as pq

    from infra.manifest import commit, object_name
    from infra.rows import KEPT
    from infra.store import open_store
    from pipelines.pack import Outcome, pack
    from pipelines.pictures import Picture

    records = []
    for uri, action in todo:
        store = open_store(uri)
        table = pq.read_table(store.local(object_name(action.inputs[0])))
        numbers = [int(url.rpartition("/")[2].removesuffix(".jpg")) for url in table["url"].to_pylist()]

        def take(positions: Sequence[int], numbers: list[int] = numbers) -> Iterator[tuple[int, Outcome]]:
            for position in positions:
                data = picture(numbers[position])
                shown = Picture(None, data, 16, 16, 16, 16)
                yield position, Outcome(KEPT, hashlib.sha256(data).digest(), shown)

        with store.scratch() as out:
            records.append(commit(store, action, pack(action, table, {}, take, store, out, "jpg"), out))
    return records


def embedded(todo: Sequence[tuple[str, Any]]) -> list[Any]:
    """Shards of embed: vectors and scores that are drawn."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from infra import rows
    from infra.manifest import Record, commit
    from infra.store import open_store
    from pipelines.embed import BLOCK_ROWS, TABLE, chosen_rows

    records = []
    for uri, action in todo:
        store = open_store(uri)
        chosen = chosen_rows(store, action.inputs[1], action.inputs[2])
        random, count = np.random.default_rng(int(action.key[:8], 16)), chosen.num_rows
        vectors = [pa.FixedSizeListArray.from_arrays(pa.array(random.normal(size=4 * count).astype(np.float32)), 4)] * 2
        scores = pa.array(random.random(count), pa.float32())
        columns = [chosen["uid"], chosen["caption"], *vectors, scores, pa.array([b"\0" * 64] * count), chosen["url"]]
        with store.scratch() as out:
            pq.write_table(pa.table(columns, schema=rows.embedded(4)), out / TABLE, row_group_size=BLOCK_ROWS)
            made = Record.of(action, out, states={rows.KEPT: count})
            records.append(commit(store, action, made, out))
    return records


def clip(todo: Sequence[tuple[str, Any]]) -> list[Any]:
    """A record in the place of CLIP's: nothing here reads it."""
    from infra.manifest import Record, commit
    from infra.store import open_store

    records = []
    for uri, action in todo:
        store = open_store(uri)
        with store.scratch() as out:
            (out / "nothing").write_bytes(b"")
            records.append(commit(store, action, Record.of(action, out), out))
    return records


def steps(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Name → the command that is measured, in their order."""
    recipe, store = str(folder / "recipe.yaml"), ["--store", str(folder / "store")]
    yield "plan, before anything", ["plan", recipe, *store]
    yield "source", ["run", recipe, "--until", "source", *store]
    yield "download", []
    for name in ("filter-look", "filter"):
        yield name, ["run", recipe, "--until", name, *store]
    yield "clip", []
    yield "embed", []
    for name in ("curate-look", "curate"):
        yield name, ["run", recipe, "--until", name, *store]
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
    from pipelines.cli import main

    sys.argv = ["unclip", *command]
    try:
        main()
    finally:
        with open("/proc/self/status") as status:
            peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
        told.write_text(json.dumps({"peak": peak // 1024}))


def prove(out: Path, sizes: Sequence[int]) -> dict[str, dict[str, dict[str, Any]]]:
    """Step → rows → figures, of all steps at all sizes."""
    place = out / "figures.json"
    figures: dict[str, dict[str, dict[str, Any]]] = json.loads(place.read_text()) if place.exists() else {}
    for rows in sizes:
        folder = out / str(rows)
        folder.mkdir(parents=True, exist_ok=True)
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
    lines = [f"| command | MiB at {few} rows | at {many} | ratio | Ray's worker | seconds |", "|---|---|---|---|---|---|"]
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
        arguments = parser.parse_args()
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{arguments.out.absolute()}/mlflow.db")
        lines, worst = table(prove(arguments.out, arguments.rows), arguments.rows)
        print("\n".join(lines))
        if worst > MOST:
            raise SystemExit(f"peak memory grew to {worst:.2f} times, more than {MOST}")
