from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from infra.errors import Refused
from tests.fixtures.fits import SIDE, Tiny, png, tiny
from training.data.batches import Data, Reads, picture
from training.data.feed import Feed
from training.data.order import Order

PICTURES = Reads(image=partial(picture, size=SIDE), originals=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("tiny"))


def everything(data: Data) -> list[tuple[int, int]]:
    return [(block, row) for block, count in enumerate(data.counts) for row in range(count)]


@pytest.mark.parametrize("source", ["embed", "download"])
def test_each_row_comes_with_its_own_picture_and_caption(world, source):
    versions = (world.embed, world.curate) if source == "embed" else (world.download, world.filter)
    data = Data(world.store, *versions, PICTURES)
    batch = data.batch(everything(data), 0)
    found = dict(zip(batch.uids, zip(batch.captions, batch.tensors["image"].numpy(), strict=True), strict=True))
    for uid, (caption, pixels) in world.kept.items():
        assert found[uid][0] == caption
        assert np.array_equal(found[uid][1], pixels)
    assert len(found) == len(batch) == {"embed": len(world.kept), "download": 3 * 32}[source]


def test_base_pictures_and_embeddings_lie_beside_each_other(world):
    data = Data(world.store, world.embed, world.curate, Reads(image=partial(picture, size=16), embeddings=True))
    batch = data.batch(everything(data), 0)
    assert set(batch.uids) == set(world.kept)
    assert batch.tensors["image"].shape == (len(world.kept), 3, 16, 16)
    assert batch.tensors["image_embedding"].shape == (len(world.kept), 32)
    for uid, image in zip(batch.uids, batch.tensors["image"], strict=True):
        assert np.array_equal(image.numpy(), world.kept[uid][1][:, 2::4, 2::4])


def test_a_batch_does_not_depend_on_the_cache(world):
    def read(captions):
        return {"length": torch.tensor([float(len(caption)) for caption in captions])}

    reads = Reads(image=partial(picture, size=16), embeddings=True, text=True)
    ample, none = (
        Data(world.store, world.embed, world.curate, reads, read_text=read, cache=cache) for cache in (1 << 30, 0)
    )
    rows = everything(ample)[::-3]
    for _ in range(2):
        one, other = ample.batch(rows, 0), none.batch(rows, 0)
        assert one.uids == other.uids
        for name, tensor in one.tensors.items():
            assert torch.equal(tensor, other.tensors[name])
    assert one.tensors["length"].tolist() == [len(caption) for caption in one.captions]


def test_the_cache_is_bounded_in_bytes(world):
    vectors = Reads(embeddings=True, text_embeddings=True)
    data = Data(world.store, world.embed, world.curate, vectors, cache=20_000)
    for block in range(len(data.counts)):
        data.block(block)
    held = sum(rows.bytes for rows in data._cached.values())
    assert 10_000 < held <= 20_000
    assert held == data._held


@pytest.mark.parametrize(("cache", "decoded"), [(2_000_000, True), (700_000, False)])
def test_decoded_pictures_stay_only_where_all_have_room(world, cache, decoded):
    data = Data(world.store, world.embed, world.curate, PICTURES, cache=cache)
    batch = data.batch(everything(data), 0)
    assert all(("image" in rows.tensors) == decoded for rows in data._cached.values())
    assert (data._held > batch.tensors["image"].nbytes) == decoded


def test_a_selection_of_other_data_is_refused(world, tmp_path):
    with pytest.raises(Refused, match="another version of the data"):
        Data(world.store, world.embed, world.filter, PICTURES)


def test_pictures_are_averaged_down_and_never_up():
    pixels = np.zeros((3, 8, 12), np.uint8)
    pixels[:, :, 2:6] = 200
    small = picture(png(pixels), b"", size=4)
    assert small[0].tolist() == [[200, 200, 0, 0]] * 4
    with pytest.raises(Refused, match=r"12×8 px, and this model trains on 16 px"):
        picture(png(pixels), b"", size=16)


def test_the_feed_keeps_the_order_and_hands_errors_on(world):
    data = Data(world.store, world.embed, world.curate, PICTURES)
    order = Order(data.counts, 2, 3, 2, 0)
    with Feed(data, order, [0, 1], 4, 6, 2, 1) as feed:
        fed = [feed.next() for _ in range(4)]
    steps = [(4, 0), (4, 1), (5, 0), (5, 1)]
    for batch, (step, lane) in zip(fed, steps, strict=True):
        assert batch.uids == data.batch(order.rows(step, lane), 0).uids
    assert len({batch.seed for batch in fed}) == 4

    broken = Data(world.store, world.embed, world.curate, Reads(image=partial(picture, size=999), originals=True))
    with Feed(broken, order, [0], 0, 1, 1, 1) as feed, pytest.raises(Refused, match="999 px"):
        feed.next()
