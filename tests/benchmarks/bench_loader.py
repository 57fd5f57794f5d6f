"""The loader alone against webdataset's plain sequential pipeline, and how soon the first batch is there.

Run with `make bench`. Ours reads in the order of training (shuffled blocks, 16 mixed at a time) through the feed;
webdataset reads its tars from front to back, unshuffled, in the same process. Both give batches of 64 as tensors. Of
the tars both read the same files; of the Parquet rows webdataset reads tars of the same payload (one .npy of both
embeddings, the caption, the base picture as PNG). What counts is processor time of all threads, so that rows a second
are rows a second and core. Opening the data is in it.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from infra.store.opening import open_store
from tests.benchmarks.loading import BASE, LARGE, Files, files
from tests.benchmarks.measure import MARGIN, compare, one_thread
from training.data.batches import Data, Reads, picture
from training.data.feed import Feed
from training.data.order import Order

pytest_plugins = ["tests.fixtures.s3"]
BATCH, WINDOW, CACHE = 64, 16, 256 << 20
TENSORS = Reads(embeddings=True, text_embeddings=True)
BASES = replace(TENSORS, image=partial(picture, size=BASE))
TARS = Reads(image=partial(picture, size=LARGE), originals=True)
READS: dict[str, tuple[Reads, str, str, tuple[str, ...]]] = {
    "prior": (TENSORS, "embed", "vectors", ("npy", "txt", "__key__")),
    "decoder": (BASES, "embed", "bases", ("png", "npy", "txt", "__key__")),
    "upsampler": (TARS, "embed", "tars", ("jpg", "txt", "__key__")),
    "clip": (TARS, "download", "tars", ("jpg", "txt", "__key__")),
}
"""What each kind of model reads: of the store, the version; of webdataset, the tars and the members."""
SECONDS = 2.0


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Files:
    one_thread()
    return files(tmp_path_factory.mktemp("loading"), shards=8, count=512)


def ours(stored: Files, kind: str, *, spread: bool = False, first: int = 0, steps: int | None = None) -> int:
    """Rows of an epoch, or of so many steps from one on."""
    reads, source, _, _ = READS[kind]
    versions = (stored.embed, stored.curate) if source == "embed" else (stored.download, stored.filter)
    data = Data(stored.store, *versions, reads, cache=CACHE)
    order = Order(data.counts, 1, BATCH, WINDOW, 0, spread)
    end = sum(data.counts) // BATCH if steps is None else first + steps
    with Feed(data, order, [0], first, end, 2, 1) as feed:
        return sum(len(feed.next()) for _ in range(first, end))


def theirs(stored: Files, kind: str) -> int:
    """The same of webdataset."""
    _, _, tars, members = READS[kind]
    pipeline = webdataset.WebDataset(getattr(stored, tars), shardshuffle=False, empty_check=False)
    pipeline = pipeline.decode("torchrgb8").to_tuple(*members).batched(BATCH)
    count = 0
    for batch in pipeline:
        tensors = [torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in batch]
        count += len(tensors[0])
    return count


@pytest.mark.parametrize("kind", READS)
def test_rows_a_second_and_core_are_no_fewer_than_webdatasets(stored: Files, kind: str) -> None:
    assert ours(stored, kind) == theirs(stored, kind) == stored.rows
    variants = {"windows": lambda: ours(stored, kind), "spread": lambda: ours(stored, kind, spread=True)}
    found = compare(f"{kind}'s rows", variants, {"in order": lambda: theirs(stored, kind)}, peer="webdataset")
    assert found.ratio <= 1 + MARGIN


def seconds(call: Callable[[], Any], times: int = 3) -> float:
    """Median seconds on the clock."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


@pytest.mark.parametrize("kind", ["prior", "upsampler"])
def test_resuming_late_costs_as_little_as_starting(stored: Files, kind: str) -> None:
    late = 9 * stored.rows // 10 // BATCH
    start, resumed = (seconds(lambda step=step: ours(stored, kind, first=step, steps=1)) for step in (0, late))
    print(f"\n{kind}: the first batch is there after {start:.2f} s, at 90 % of an epoch after {resumed:.2f} s")
    assert abs(start - resumed) < SECONDS


@pytest.mark.parametrize("kind", ["prior", "upsampler"])
def test_resuming_late_from_s3_costs_as_little_as_starting(
    stored: Files, kind: str, s3_uri: str, tmp_path: Path
) -> None:
    far = open_store(s3_uri)
    for prefix in ("objects/", "records/", "manifests/"):
        for entry in stored.store.list(prefix):
            far.put_new(entry.name, stored.store.local(entry.name))
    caches = (tmp_path / str(number) for number in itertools.count())  # nothing of S3's is on this machine

    def first_batch(step: int) -> None:
        ours(replace(stored, store=open_store(s3_uri, cache=next(caches))), kind, first=step, steps=1)

    late = 9 * stored.rows // 10 // BATCH
    start, resumed = (seconds(partial(first_batch, step)) for step in (0, late))
    print(f"\n{kind}, from S3: the first batch after {start:.2f} s, at 90 % of an epoch after {resumed:.2f} s")
    assert abs(start - resumed) < SECONDS


@pytest.mark.parametrize("spread", [False, True])
def test_the_order_of_600_million_rows_is_entered_late_in_a_moment(tmp_path: Path, spread: bool) -> None:
    blocks = tuple(np.random.default_rng(0).integers(100, 257, 3_400_000).tolist())

    def entered(share: float) -> None:
        order = Order(blocks, 32, 64, WINDOW, 0, spread)
        step = int(share * sum(blocks)) // (32 * 64)
        for lane in range(0, 32, 8):  # one of eight workers
            order.rows(step, lane)

    start, late = (seconds(partial(entered, share), 1) for share in (0.0, 0.9))
    print(f"\n{sum(blocks) / 1e6:.0f} M rows: first step after {start:.2f} s, at 90 % of an epoch after {late:.2f} s")
    assert abs(start - late) < SECONDS
