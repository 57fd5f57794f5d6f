"""What training reads of the store: each block about once an epoch, and of what a resumed run skips nothing at all."""

from __future__ import annotations

import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infra.errors import Refused
from infra.records.manifest import Manifest
from infra.records.objects import object_name
from infra.store.base import Store
from infra.store.cache import cache_bytes
from infra.store.local import LocalStore
from infra.store.opening import open_store
from infra.store.s3 import S3Store
from tests.fixtures.fits import SIDE, Tiny, tiny
from tests.fixtures.s3 import requests
from training.data.batches import Data, Reads, picture
from training.data.feed import Feed
from training.data.order import Order
from training.parallel.flat import Group

VECTORS = Reads(embeddings=True, text_embeddings=True)
PICTURES = Reads(image=partial(picture, size=SIDE), originals=True, embeddings=True)
Read = tuple[str, int, int | None]


class Watched(LocalStore):
    """A store that notes what is read of it: (name, start, length)."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        object.__setattr__(self, "reads", Counter())

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        self.reads[name, start, length] += 1  # type: ignore[attr-defined]
        return super().get(name, start, length)

    def local(self, name: str) -> Path:
        self.reads[name, 0, None] += 1  # type: ignore[attr-defined]
        return super().local(name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("tiny"), shards=5, count=100, group=8)


def large(world: Tiny) -> dict[str, str]:
    """Object → shard, of what holds embeddings or pictures."""
    found = {}
    for place, record in enumerate(Manifest.load(world.store, world.embed).records):
        found[object_name(record.sha("rows.parquet"))] = f"rows {place}"
        found[object_name(record.facts["tar"])] = f"tar {place}"
    return found


def watched(world: Tiny, reads: Reads, **settings: Any) -> tuple[Data, Counter[Read]]:
    """The data, and the reads of embeddings and pictures from now on; opening it made none."""
    assert isinstance(world.store, LocalStore)
    store, names = Watched(world.store.root), large(world)
    data = Data(store, world.embed, world.curate, reads, **settings)
    noted: Counter[Read] = store.reads  # type: ignore[attr-defined]
    assert noted
    assert not [read for read in noted if read[0] in names]
    noted.clear()
    return data, noted


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("reads", [VECTORS, PICTURES], ids=["parquet", "tar"])
def test_an_epoch_reads_each_block_about_once(world: Tiny, reads: Reads, spread: bool) -> None:
    data, noted = watched(world, reads, cache=40_000)
    order = Order(data.counts, lanes=2, micro=4, window=4, seed=0, spread=spread)
    seen: Counter[bytes] = Counter()
    for step in range(sum(data.counts) // 8):
        for lane in range(2):
            seen.update(data.batch(order.rows(step, lane), 0).uids)
    assert data._held <= 40_000 < sum(data.counts) * data.row_bytes  # so not all of it lay in memory
    # Of each block one range of columns; of each picture its bytes; beside them every file's foot, which is at its end.
    kinds, sizes = large(world), {entry.name: entry.bytes for entry in world.store.list("objects/")}
    ranges: dict[str, Counter[Read]] = {"rows": Counter(), "tar": Counter()}
    for (name, start, length), times in noted.items():
        if name in kinds:
            assert length is not None  # never a whole file
            if start + length < sizes[name] or kinds[name].startswith("tar"):
                ranges[kinds[name].split()[0]][name, start, length] += times
    assert len(ranges["rows"]) == len(data.counts)
    assert ranges["rows"].total() <= 1.1 * len(data.counts)
    if reads.originals:
        assert ranges["tar"].total() == seen.total() + 1  # the first tells whether all have room
        assert len(ranges["tar"]) >= len(seen)


def test_resuming_late_reads_only_the_blocks_that_are_mixed_just_then(world: Tiny) -> None:
    data, noted = watched(world, VECTORS, cache=1 << 20)
    order = Order(data.counts, lanes=2, micro=4, window=3, seed=0)
    step = 9 * sum(data.counts) // 10 // 8
    rows = [order.rows(step, lane) for lane in range(2)]
    for lane in range(2):
        data.batch(rows[lane], 0)
    names = large(world)
    shards = {names[name] for name, _, _ in noted if name in names}
    assert shards == {f"rows {block // 10}" for lane in rows for block, _ in lane}
    # Of each block one range of embeddings, and of each shard its foot.
    blocks = {block for lane in rows for block, _ in lane}
    assert sum(noted.values()) <= 2 * len(blocks) + 3 * len(shards)


def uids(world: Tiny, ranks: int, **how: Any) -> bytes:
    """uids and pixels in the order of the samples, as so many ranks read them, each with a feed of its own."""
    found: dict[tuple[int, int], bytes] = {}
    lanes, first, steps = 8, 3, 12
    for rank in range(ranks):
        group, prefetch = Group(rank, ranks), how.get("prefetch", 1)
        settings = {name: how[name] for name in ("cache", "decoders") if name in how}
        data = Data(world.store, world.embed, world.curate, PICTURES, **settings)
        order, mine = Order(data.counts, lanes, 3, 2, 5, how.get("spread", False)), group.lanes(lanes)
        with Feed(data, order, [lane for lane, _ in mine], first, steps, prefetch, 1) as feed:
            for step in range(first, steps):
                for lane, weight in mine:
                    batch = feed.next()
                    if weight:
                        found[step, lane] = b"".join(batch.uids) + batch.tensors["image"].numpy().tobytes()
    assert len(found) == lanes * (steps - first)
    return b"".join(found[place] for place in sorted(found))


@pytest.mark.slow
@pytest.mark.parametrize("spread", [False, True])
def test_1_2_3_and_8_ranks_read_the_same_samples_byte_for_byte(world: Tiny, spread: bool) -> None:
    alone = uids(world, 1, spread=spread)
    for ranks in (2, 3, 8):
        assert uids(world, ranks, spread=spread) == alone


@pytest.mark.parametrize("how", [{"decoders": 3}, {"prefetch": 9, "cache": 1 << 30}, {"decoders": 2, "cache": 30_000}])
def test_threads_prefetch_and_memory_change_no_byte(world: Tiny, how: dict[str, int]) -> None:
    assert uids(world, 2, **how) == uids(world, 1)


def test_rows_that_are_not_those_of_their_selection_are_refused(world: Tiny, tmp_path: Path) -> None:
    """A shard's rows exchanged after their selection was made, as only damage can do it."""
    data = Data(world.store, world.embed, world.curate, VECTORS)
    here, other = data.places[0], data.places[1]
    object.__setattr__(here, "names", other.names)
    with pytest.raises(Refused, match=r"rows 0 to 7 of the shard [0-9a-f]{12} are not"):
        data.block(0)


def moved(world: Tiny, uri: str) -> S3Store:
    """The same objects in S3."""
    store = open_store(uri)
    assert isinstance(store, S3Store)
    for entry in world.store.list(""):
        store.put_new(entry.name, world.store.get(entry.name))
    return store


def epoch(data: Data, spread: bool = False) -> list[tuple[list[bytes], np.ndarray, torch.Tensor]]:
    order = Order(data.counts, 1, 8, 4, 0, spread)
    made = [data.batch(order.rows(step, 0), 0) for step in range(sum(data.counts) // 8)]
    return [(one.uids, one.tensors["image"].numpy(), one.tensors["image_embedding"]) for one in made]


def same(one: Any, other: Any) -> bool:
    return all(
        a[0] == b[0] and np.array_equal(a[1], b[1]) and torch.equal(a[2], b[2]) for a, b in zip(one, other, strict=True)
    )


def test_from_s3_each_part_is_fetched_once_and_then_lies_here(world: Tiny, s3_uri: str) -> None:
    store, names = moved(world, s3_uri), large(world)
    expected = epoch(Data(world.store, world.embed, world.curate, PICTURES))
    with requests(store) as sent:
        data = Data(store, world.embed, world.curate, PICTURES)
        assert not [name for _, name in sent if name in names]  # the counts of all blocks came without their rows
        assert same(epoch(data), expected)
    fetched = Counter(names[name].split()[0] for _, name in sent if name in names)
    assert fetched["tar"] == len([count for count in data.counts if count])  # a range of pictures for each block
    assert fetched["rows"] <= 2 * len(data.counts) + 3 * 5
    with requests(store) as sent:
        assert same(epoch(Data(store, world.embed, world.curate, PICTURES)), expected)
    assert not [name for _, name in sent if name in names]


def test_the_feed_brings_the_next_windows_blocks_from_s3_and_each_of_them_once(
    world: Tiny, s3_uri: str, tmp_path: Path
) -> None:
    store, names = moved(world, s3_uri), large(world)
    near = Data(world.store, world.embed, world.curate, PICTURES)
    data = Data(store, world.embed, world.curate, PICTURES, decoders=3)
    order = Order(data.counts, 2, 4, 3, 0, spread=True)
    with requests(store) as sent, Feed(data, order, [0, 1], 5, 6, 1, 1) as feed:
        for lane in range(2):
            batch, expected = feed.next(), near.batch(order.rows(5, lane), 0)
            assert batch.uids == expected.uids
            assert torch.equal(batch.tensors["image"], expected.tensors["image"])
        windows = [order.window_of(5, lane) for lane in range(2)]
        wanted = {
            block
            for lane, window in enumerate(windows)
            for n in (window, window + 1)
            for block in order.blocks_of(lane, n)
        }
        tars = [name for _, name in sent if names.get(name, "").startswith("tar")]
        deadline = time.monotonic() + 20
        while len(tars) < len(wanted) and time.monotonic() < deadline:
            time.sleep(0.05)
            tars = [name for _, name in sent if names.get(name, "").startswith("tar")]
    assert len(tars) == len(wanted)
    assert len(list((tmp_path / "cache").rglob("*@*"))) >= 2 * len(wanted)


def test_parts_of_s3_objects_stay_below_the_bound(
    world: Tiny, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Store = moved(world, s3_uri)
    expected = epoch(Data(world.store, world.embed, world.curate, PICTURES), spread=True)
    monkeypatch.setenv("UNCLIP_CACHE_GB", "1e-4")
    data = Data(store, world.embed, world.curate, PICTURES)
    order, most = Order(data.counts, 1, 8, 4, 0, spread=True), 0
    for step, (uids, pixels, _) in enumerate(expected):
        batch = data.batch(order.rows(step, 0), 0)
        assert batch.uids == uids
        assert np.array_equal(batch.tensors["image"].numpy(), pixels)
        parts = [path.stat().st_size for path in (tmp_path / "cache").rglob("*@*")]
        most = max(most, sum(parts))
    assert 0 < most <= cache_bytes() * 17 // 16 + 20_000  # looked at whenever a sixteenth has come in
