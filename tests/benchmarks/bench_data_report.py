"""The data report over 500 shards: processor time a row, and memory that does not grow with the shards.

Run with `make bench`. Shards are made up as `download` and `filter` leave them: 1,000 rows each, 20,000 hosts of very
different sizes, a tenth of the rows failed, a twentieth of the others taken by rules. `python -m
tests.benchmarks.bench_data_report STORE` makes the page of such a store and says its peak memory in bytes.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from infra.records.manifest import Action, Manifest, Record
from infra.records.objects import object_name
from infra.records.schemas import INDEX, KEPT, SELECTION
from infra.store.base import Store
from infra.store.opening import open_store

ROWS = 1_000
STATES = np.array([KEPT, "http_404", "http_403", "timeout", "undecodable", "too_small"])
WORDS = np.array("a an old red small house boat with of in on the sea by tree photograph vintage poster new".split())  # noqa: SIM905


def write_shards(store: Store, shards: int) -> Manifest:
    """A filtered download of so many shards; returns filter's manifest."""
    random = np.random.default_rng(0)
    pictures = io.BytesIO()
    places = []
    for hue in range(16):
        begin = pictures.tell()
        Image.new("HSV", (48, 64), (hue * 16, 160, 220)).convert("RGB").save(pictures, "PNG")
        places.append((begin, pictures.tell() - begin))
    downloads, chosen = [], {}
    for number in range(shards):
        action = Action("download/1", {}, (f"{number:064x}",))
        with store.scratch() as out:
            index = _index(random, places)
            (out / "images.tar").write_bytes(pictures.getvalue())
            pq.write_table(index, out / "index.parquet", row_group_size=256, compression="zstd")
            states = dict(zip(*np.unique(index["state"].to_numpy(), return_counts=True), strict=True))
            record = Record.of(action, out, states={str(state): int(count) for state, count in states.items()})
            downloads.append(_laid(store, record, out))
        chosen[downloads[-1].sha("index.parquet")] = index.filter(pa.compute.equal(index["state"], KEPT))["uid"]
    download = Manifest(Action("download/1", {}, ()), tuple(downloads))
    download.save(store)
    rules = [{"rule": "size", "min_side": 200}, {"rule": "caption", "min_words": 3}]
    action = Action("filter/1", {"rules": rules}, (download.version,))
    with store.scratch() as out:
        counted: dict[str, int] = {}
        for sha, uids in chosen.items():
            taken = random.choice(np.array([None, "size", "caption"], object), len(uids), p=[0.95, 0.03, 0.02])
            table = pa.table([uids.combine_chunks(), pa.array(taken, pa.string())], schema=SELECTION)
            pq.write_table(table, out / f"{sha}.parquet", compression="zstd")
            for rule in taken:
                counted[rule or KEPT] = counted.get(rule or KEPT, 0) + 1
        made = Manifest(action, (_laid(store, Record.of(action, out, states=counted), out),))
    made.save(store)
    return made


def _laid(store: Store, record: Record, out: Path) -> Record:
    """A record whose files lie in the store (a folder), put there without the care that `commit` takes."""
    for name, file in record.files.items():
        place = Path(store.uri, object_name(file.sha256))
        place.parent.mkdir(parents=True, exist_ok=True)
        (out / name).rename(place)
    return record


def _index(random: np.random.Generator, places: list[tuple[int, int]]) -> pa.Table:
    states = random.choice(STATES, ROWS, p=[0.9, 0.05, 0.01, 0.02, 0.01, 0.01])
    kept = states == KEPT
    hosts = (random.zipf(1.3, ROWS) - 1) % 20_000
    where = [places[at] for at in random.integers(len(places), size=ROWS)]
    words = np.maximum(1, random.lognormal(2.1, 0.6, 50)).astype(int)
    captions = [" ".join(random.choice(WORDS, number)) for number in words]
    sides = np.exp(random.normal(6.3, 0.6, (ROWS, 2))).astype(np.int32) + 32
    columns = {
        "uid": [random.bytes(16) for _ in range(ROWS)],
        "url": [f"https://images{host}.a-rather-long-name.test/{host}/{at}.jpg" for at, host in enumerate(hosts)],
        "caption": [captions[at] for at in random.integers(len(captions), size=ROWS)],
        "state": states,
        "offset": [at if ok else None for ok, (at, _) in zip(kept, where, strict=True)],
        "length": [size if ok else None for ok, (_, size) in zip(kept, where, strict=True)],
        "width": [int(side) if ok else None for ok, side in zip(kept, sides[:, 0], strict=True)],
        "height": [int(side) if ok else None for ok, side in zip(kept, sides[:, 1], strict=True)],
        "sha256": [random.bytes(32) for _ in range(ROWS)],
    }
    return pa.table(columns, schema=INDEX)


def test_ten_times_the_shards_take_no_more_memory(tmp_path: Path) -> None:
    from tests.benchmarks.measure import peak_in_child  # here, so that what is measured does not import torch

    peaks = {}
    for shards in (50, 500):
        write_shards(open_store(str(tmp_path / str(shards))), shards)
        before = _processor_time()
        peaks[shards] = peak_in_child("tests.benchmarks.bench_data_report", str(tmp_path / str(shards)))
        rows, took = shards * ROWS, _processor_time() - before
        print(f"\n{rows:,} rows: {took:.1f} s of processor time, peak {peaks[shards] / 1e6:.0f} MB", end="")
    print(f"\ndata report: memory × {peaks[500] / peaks[50]:.2f} for ten times the shards", end="")
    assert peaks[500] < 1.3 * peaks[50]


def _processor_time() -> float:
    """Seconds that children of this process computed."""
    return os.times().children_user + os.times().children_system


def main(uri: str) -> None:
    """Makes the page beside the store."""
    from pipelines.reports.data import write

    write(open_store(uri, create=False), "", Path(uri + ".html"))
    with open("/proc/self/status") as status:
        print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")))


if __name__ == "__main__":
    main(sys.argv[1])
