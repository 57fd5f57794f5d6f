"""Download against bare img2dataset: the same shard, server, threads, timeout, size, format and digest, a process each.

Run with `make bench` (Linux: hosts are addresses of loopback). What is timed is one shard, from the list to the closed
tar, without either side's imports; the two take turns, and ratios are of neighbours. By default img2dataset also looks
for EXIF, which we do not: here it is told not to. Where nothing hangs, processor time counts beside the clock, since
others' work on the machine leaves it as it is.
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.records.manifest import Action, Manifest, Record
from infra.records.objects import object_name
from infra.records.schemas import SOURCE, pair_uid
from infra.store.opening import open_store
from pipelines.download.stage import Download, DownloadHow, DownloadSpec
from tests.benchmarks.bare import Took, bare
from tests.benchmarks.web import address, serving

HOSTS, THREADS, SIZE = 20, 16, 256


def rows(count: int, port: int) -> pa.Table:
    """A list over all hosts."""
    urls = [f"http://{address(number % HOSTS)}:{port}/{number}.jpg" for number in range(count)]
    captions = [f"picture {number}" for number in range(count)]
    names = pa.array([pair_uid(*pair) for pair in zip(urls, captions, strict=True)], pa.binary(16))
    return pa.table([names, urls, captions], schema=SOURCE)


def ours(table: pa.Table, folder: Path, timeout_s: int) -> Took:
    """Our stage's shard of a list, in a store of its own."""
    store = open_store(str(folder))
    how = DownloadHow(threads=THREADS, timeout_s=timeout_s, retries=0, allow=("127.0.0.0/8",))
    stage = Download(DownloadSpec(size=SIZE), how)
    stage.setup()
    action = Action("source/1", {}, ())
    with store.scratch() as out:
        pq.write_table(table, out / "00000.parquet")
        record = Record.of(action, out, states={"listed": len(table)}, facts={"slices": ["00000.parquet"]})
        store.put_new(object_name(record.sha("00000.parquet")), out / "00000.parquet")
    (download,) = stage.actions(Manifest(action, (record,)))
    with store.scratch() as out:
        began, worked = time.perf_counter(), time.process_time()
        made = stage.run(download, store, out)
        return Took(time.perf_counter() - began, time.process_time() - worked, made.states["kept"])


@pytest.mark.parametrize(
    ("what", "count", "hanging", "closing", "timeout_s", "rounds", "least"),
    [
        ("all hosts answer", 1000, 0, False, 10, 7, 1.0),
        ("all hosts answer, and hang up behind each answer", 1000, 0, True, 10, 7, None),
        ("a tenth of the hosts hang", 2000, 2, False, 2, 1, 3.0),
    ],
)
def test_downloading_is_as_fast_as_img2dataset_and_hanging_hosts_hold_nobody_up(
    tmp_path: Path,
    what: str,
    count: int,
    hanging: int,
    closing: bool,
    timeout_s: int,
    rounds: int,
    least: float | None,
) -> None:
    walls, works = list[float](), list[float]()
    with serving(HOSTS, hanging, closing) as port, bare(THREADS, SIZE, timeout_s, exif=False) as peer:
        table, warm = rows(count, port), rows(HOSTS - hanging, port)
        ours(warm, tmp_path / "ours", timeout_s)  # what a process does once
        peer.shard(warm, tmp_path / "theirs")
        for number in range(rounds):
            for folder in (tmp_path / "ours", tmp_path / "theirs"):
                shutil.rmtree(folder)
            if number % 2:
                mine, other = ours(table, tmp_path / "ours", timeout_s), peer.shard(table, tmp_path / "theirs")
            else:
                other, mine = peer.shard(table, tmp_path / "theirs"), ours(table, tmp_path / "ours", timeout_s)
            assert mine.kept == other.kept == count * (HOSTS - hanging) // HOSTS
            walls.append(other.wall / mine.wall)
            works.append(other.cpu / mine.cpu)
            print(f"\n{what}: {count / mine.wall:.0f} rows/s against {count / other.wall:.0f}", end="; ")
            print(f"{mine.cpu / count * 1e3:.2f} ms of processor time a row against {other.cpu / count * 1e3:.2f}")
    wall, work = statistics.median(walls), statistics.median(works)
    print(f"{what}: {wall:.2f} × bare img2dataset, {work:.2f} × by processor time", end=" ")
    print(f"({rounds} rounds, {THREADS} threads, {count} rows)", flush=True)
    assert least is None or wall >= least
    assert hanging or work >= 1.0
