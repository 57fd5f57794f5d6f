"""img2dataset by itself, for bench_download.py: its Downloader, as its own `download` makes it for a process.

Run as `python -m tests.benchmarks.bare THREADS SIZE TIMEOUT EXIF`: of each line it reads, a Parquet list (url, caption)
and a folder that does not exist yet, it makes one shard and prints what that took. The imports, of which each process
that img2dataset starts has its own, are over before, and the process that it starts to write its log is left out.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq


class Took(NamedTuple):
    """What a shard took, and gave."""

    wall: float
    """Seconds on the clock."""
    cpu: float
    """Seconds of processor time."""
    kept: int
    """Pictures."""


class Bare:
    """The other side of the pipe."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def shard(self, table: pa.Table, folder: Path) -> Took:
        """Downloads a list into a new folder."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pq.write_table(table.select(["url", "caption"]), folder.with_suffix(".parquet"))
        print(json.dumps([str(folder.with_suffix(".parquet")), str(folder)]), file=self._process.stdin, flush=True)
        return Took(*json.loads(self._process.stdout.readline()))


@contextmanager
def bare(threads: int, size: int, timeout_s: int, exif: bool) -> Iterator[Bare]:
    """A process of img2dataset until the context ends."""
    command = [sys.executable, "-m", "tests.benchmarks.bare", str(threads), str(size), str(timeout_s), str(int(exif))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Bare(process)
        finally:
            process.communicate()  # which ends its standard input


def downloader(threads: int, size: int, timeout_s: int, exif: bool, out: Path) -> Any:
    """As img2dataset.main.download makes it; what bench_download's settings do not say is at its default."""
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    resizer = Resizer(
        image_size=size,
        resize_mode="keep_ratio",
        resize_only_if_bigger=True,
        upscale_interpolation="lanczos",
        downscale_interpolation="area",
        encode_quality=95,
        encode_format="jpg",
        skip_reencode=False,
        disable_all_reencoding=False,
        min_image_size=0,
        max_image_area=math.inf,
        max_aspect_ratio=math.inf,
        blurrer=None,
    )
    return Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=resizer,
        thread_count=threads,
        save_caption=True,
        extract_exif=exif,
        output_folder=str(out),
        column_list=["url", "caption"],
        timeout=timeout_s,
        number_sample_per_shard=1_000_000,
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=["noai", "noimageai", "noindex", "noimageindex"],
    )


def main() -> None:
    """Makes a shard of each line that comes."""
    threads, size, timeout_s, exif = map(int, sys.argv[1:])
    import img2dataset  # noqa: F401  before the first line is answered

    for line in sys.stdin:
        urls, folder = map(Path, json.loads(line))
        folder.mkdir()
        shard, table = folder / "00000.feather", pq.read_table(urls)
        with pa.OSFile(str(shard), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        work = downloader(threads, size, timeout_s, bool(exif), folder)
        wall, cpu = time.perf_counter(), time.process_time()
        work.download_shard((0, str(shard)))
        took = time.perf_counter() - wall, time.process_time() - cpu
        told = json.loads((folder / "00000_stats.json").read_text())
        print(json.dumps([*took, told["successes"]]), flush=True)


if __name__ == "__main__":
    main()
