"""Download against bare img2dataset: the same shard, server, threads, timeout, size and format, one process each.

Run with `make bench` (Linux: hosts are addresses of loopback). What is timed is one shard, from the list to the closed
tar, without either side's imports: of img2dataset the time that it writes into the shard's statistics. Processor time
is told beside it, since others' work on the machine leaves that as it is.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.manifest import Action, Manifest, Record, object_name
from infra.rows import SOURCE, uid
from infra.store import open_store
from pipelines.download import Download, DownloadHow, DownloadSpec
from tests.benchmarks.web import address, serving

HOSTS, THREADS, SIZE = 20, 16, 256

PEER = """
import sys, time
from pathlib import Path
from img2dataset import download, downloader

class Timed(downloader.Downloader):  # its processes run this file as well, and so find it
    def download_shard(self, row):
        began = time.process_time()
        super().download_shard(row)
        Path(self.output_folder, "cpu").write_text(str(time.process_time() - began))

downloader.Downloader = sys.modules["img2dataset.main"].Downloader = Timed
if __name__ == "__main__":
    urls, out, threads, timeout, size = sys.argv[1:]
    download(
        url_list=urls, input_format="parquet", url_col="url", caption_col="caption", output_folder=out,
        output_format="webdataset", processes_count=1, thread_count=int(threads), timeout=int(timeout), retries=0,
        image_size=int(size), resize_mode="keep_ratio", resize_only_if_bigger=True, number_sample_per_shard=1_000_000,
        enable_wandb=False, compute_hash="sha256",
    )
"""


def rows(count: int, port: int) -> pa.Table:
    """A list over all hosts."""
    urls = [f"http://{address(number % HOSTS)}:{port}/{number}.jpg" for number in range(count)]
    captions = [f"picture {number}" for number in range(count)]
    names = pa.array([uid(*pair) for pair in zip(urls, captions, strict=True)], pa.binary(16))
    return pa.table([names, urls, captions], schema=SOURCE)


def ours(table: pa.Table, folder: Path, timeout_s: int) -> tuple[float, float, int]:
    """Seconds, processor seconds, and pictures kept."""
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
        return time.perf_counter() - began, time.process_time() - worked, made.states["kept"]


def theirs(table: pa.Table, folder: Path, timeout_s: int) -> tuple[float, float, int]:
    """Seconds, processor seconds, and pictures kept."""
    folder.mkdir()
    (folder / "peer.py").write_text(PEER)
    pq.write_table(table.select(["url", "caption"]), folder / "urls.parquet")
    arguments = [str(folder / "urls.parquet"), str(folder / "out"), str(THREADS), str(timeout_s), str(SIZE)]
    done = subprocess.run(
        [sys.executable, str(folder / "peer.py"), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads((folder / "out" / "00000_stats.json").read_text())
    return told["end_time"] - told["start_time"], float((folder / "out" / "cpu").read_text()), told["successes"]


@pytest.mark.parametrize(
    ("what", "count", "hanging", "closing", "timeout_s", "rounds", "least"),
    [
        ("all hosts answer", 1000, 0, False, 10, 5, 1.0),
        ("all hosts answer, and hang up behind each answer", 1000, 0, True, 10, 5, None),
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
    with serving(HOSTS, hanging, closing) as port:
        table = rows(count, port)
        ours(table, tmp_path / "warm", timeout_s)  # what a process does once, the peer's imports have done
        for number in range(rounds):
            sides = [(ours, tmp_path / f"ours-{number}"), (theirs, tmp_path / f"theirs-{number}")]
            told = {side: side(table, folder, timeout_s) for side, folder in (sides if number % 2 else sides[::-1])}
            (mine, worked, kept), (other, toiled, also) = told[ours], told[theirs]
            assert kept == also == count * (HOSTS - hanging) // HOSTS
            walls.append(other / mine)
            works.append(toiled / worked)
            print(f"\n{what}: {count / mine:.0f} rows/s against {count / other:.0f}", end="; ")
            print(
                f"{worked / count * 1e3:.2f} ms of processor time a row against {toiled / count * 1e3:.2f}", flush=True
            )
            for _, folder in sides:
                shutil.rmtree(folder)
    wall, work = statistics.median(walls), statistics.median(works)
    print(f"{what}: {wall:.2f} × bare img2dataset, {work:.2f} × by processor time", end=" ")
    print(f"({rounds} rounds, {THREADS} threads, {count} rows)", flush=True)
    assert least is None or wall >= least
