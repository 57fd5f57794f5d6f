"""How well the order shuffles: how often neighbours come from one shard, against a uniform shuffle of the same rows."""

from __future__ import annotations

from collections import Counter
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.order import Order

ROW_GROUP = 256
MIXES: dict[str, list[int]] = {
    "equal": [2_000] * 40,
    "few large": [20_000] * 3,
    "many small": [30] * 1_000,
    "many of a block": [ROW_GROUP] * 400,
    "large and small": [5_000] * 4 + [20] * 1_000,
    "one block among single rows": [ROW_GROUP] + [1] * 3_000,
}
"""Rows of each shard."""


def cut(shards: list[int], group: int = ROW_GROUP, keep: float = 1.0) -> tuple[tuple[int, ...], np.ndarray]:
    """(rows kept of each block, shard of each block), where a selection keeps that share of the rows."""
    blocks = [(shard, min(group, rows - first)) for shard, rows in enumerate(shards) for first in range(0, rows, group)]
    random = np.random.default_rng(0)
    return tuple(int(random.binomial(rows, keep)) for _, rows in blocks), np.array([shard for shard, _ in blocks])


def shares(order: Order, shard: np.ndarray) -> tuple[float, float, int]:
    """(share of neighbours from one shard in an epoch of the global order, the same of a uniform shuffle, rows)."""
    rows = sum(order.blocks)
    steps = -(-rows // (order.lanes * order.micro))
    blocks = [block for step in range(steps) for lane in range(order.lanes) for block, _ in order.rows(step, lane)]
    there = shard[blocks[:rows]]
    sizes = np.bincount(shard, weights=order.blocks)
    return float((there[1:] == there[:-1]).mean()), float((sizes * (sizes - 1)).sum() / (rows * (rows - 1))), rows


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("keep", [1.0, 0.4])
@pytest.mark.parametrize("mix", MIXES)
def test_neighbours_come_from_one_shard_at_most_twice_as_often_as_in_a_uniform_shuffle(
    mix: str, keep: float, lanes: int
) -> None:
    blocks, shard = cut(MIXES[mix], keep=keep)
    found, uniform, _ = shares(Order(blocks, lanes, 32, 16, 0, spread=True), shard)
    assert found <= 2 * uniform


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(st.integers(1, 600), min_size=2, max_size=60),
    group=st.integers(1, 64),
    lanes=st.integers(1, 4),
    window=st.integers(8, 32),
    seed=st.integers(0, 9),
)
def test_so_they_do_whatever_the_sizes_of_the_shards(shards, group, lanes, window, seed):
    blocks, shard = cut(shards, group)
    found, uniform, rows = shares(Order(blocks, lanes, 16, window, seed, spread=True), shard)
    # What is counted is a sample: three deviations, and a meeting where an epoch joins the next.
    assert found * rows <= 2 * uniform * rows + 3 * sqrt(2 * uniform * rows) + 2


def test_without_spread_that_holds_of_no_more_shards_than_a_window_has_blocks():
    few, many = ([ROW_GROUP * 4] * shards for shards in (12, 200))
    found, uniform, _ = shares(Order((blocks := cut(few))[0], 1, 32, 16, 0), blocks[1])
    assert found <= 2 * uniform
    found, uniform, _ = shares(Order((blocks := cut(many))[0], 1, 32, 16, 0), blocks[1])
    assert found == pytest.approx(1 / 16 + 15 / 16 * uniform, rel=0.1)  # 13 times as often


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any).map(tuple),
    window=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_a_lane_that_fills_a_window_an_epoch_sees_every_row_once_an_epoch(blocks, window, seed):
    order, rows = Order(blocks, 1, 1, window, seed, spread=True), sum(blocks)
    epochs = -(-window * max(blocks) // rows)  # of few rows, so many epochs are mixed
    for turn in range(2):
        seen = Counter(order.rows(turn * epochs * rows + step, 0)[0] for step in range(epochs * rows))
        assert set(seen.values()) == {epochs}
        assert len(seen) == rows


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any).map(tuple),
    lanes=st.integers(1, 5),
    micro=st.integers(1, 7),
    window=st.integers(1, 6),
    step=st.integers(0, 60),
    spread=st.booleans(),
)
def test_any_step_can_be_asked_for_without_the_steps_before_it(blocks, lanes, micro, window, step, spread):
    walked, jumped = (Order(blocks, lanes, micro, window, 7, spread) for _ in range(2))
    for before in range(step):
        for lane in range(lanes):
            walked.rows(before, lane)
    for lane in range(lanes):
        ahead = jumped.blocks_of(lane, (number := jumped.window_of(step, lane)) + 1)
        assert jumped.rows(step, lane)[0][0] in walked.blocks_of(lane, number)
        assert walked.rows(step, lane) == jumped.rows(step, lane)
        assert len(jumped.rows(step, lane)) == micro
        assert walked.blocks_of(lane, number + 1) == ahead


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("lanes", [1, 6])
def test_a_block_is_one_lanes_and_its_rows_come_close_together(lanes, spread):
    blocks, _ = cut([1_000] * 60, group=32)
    order = Order(blocks, lanes, 8, 16, 0, spread)
    steps = sum(blocks) // (8 * lanes)
    places: dict[int, list[tuple[int, int]]] = {}
    for lane in range(lanes):
        for step in range(steps):
            for place, (block, _) in enumerate(order.rows(step, lane)):
                places.setdefault(block, []).append((lane, step * 8 + place))
    # A few blocks come up in this epoch and, where lanes differ in rows, early in the next.
    once = [found for block, found in places.items() if len(found) == blocks[block]]
    assert len(once) > 0.9 * len(blocks)
    assert all(len({lane for lane, _ in found}) == 1 for found in once)
    assert max(found[-1][1] - found[0][1] for found in once) <= order.mixed + 32
