"""Download against bare img2dataset: the same shard, server, threads, timeout, size and format, one process each.

Run with `make bench` (Linux: hosts are addresses of loopback). What is timed is one shard, from the list to the closed
tar, without either side's imports: of img2dataset the time that it writes into the shard's statistics.
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
import sys
from img2dataset import download
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


def ours(table: pa.Table, folder: Path, timeout_s: int) -> tuple[float, int]:
    """Seconds, and pictures kept."""
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
        began = time.perf_counter()
        made = stage.run(download, store, out)
        return time.perf_counter() - began, made.states["kept"]


def theirs(table: pa.Table, folder: Path, timeout_s: int) -> tuple[float, int]:
    """Seconds, and pictures kept."""
    folder.mkdir()
    (folder / "peer.py").write_text(PEER)
    pq.write_table(table.select(["url", "caption"]), folder / "urls.parquet")
    arguments = [str(folder / "urls.parquet"), str(folder / "out"), str(THREADS), str(timeout_s), str(SIZE)]
    done = subprocess.run(
        [sys.executable, str(folder / "peer.py"), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads((folder / "out" / "00000_stats.json").read_text())
    return told["end_time"] - told["start_time"], told["successes"]


@pytest.mark.parametrize(
    ("what", "count", "hanging", "timeout_s", "rounds", "least"),
    [("all hosts answer", 1000, 0, 10, 3, 1.0), ("a tenth of the hosts hang", 2000, 2, 2, 1, 3.0)],
)
def test_downloading_is_as_fast_as_img2dataset_and_hanging_hosts_hold_nobody_up(
    tmp_path: Path, what: str, count: int, hanging: int, timeout_s: int, rounds: int, least: float
) -> None:
    ratios = []
    with serving(HOSTS, hanging) as port:
        table = rows(count, port)
        for number in range(rounds):
            mine, kept = ours(table, tmp_path / f"ours-{number}", timeout_s)
            other, also = theirs(table, tmp_path / f"theirs-{number}", timeout_s)
            assert kept == also == count * (HOSTS - hanging) // HOSTS
            ratios.append(other / mine)
            print(f"\n{what}: {count / mine:.0f} rows/s against {count / other:.0f}", flush=True)
            shutil.rmtree(tmp_path / f"theirs-{number}")
    ratio = statistics.median(ratios)
    print(f"{what}: {ratio:.2f} × bare img2dataset ({rounds} rounds, {THREADS} threads, {count} rows)", flush=True)
    assert ratio >= least
