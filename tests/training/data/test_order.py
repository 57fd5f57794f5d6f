from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import Refused
from training.data.order import Order, derive_seed, shuffled
from training.parallel.flat import Group

BLOCKS = st.lists(st.integers(0, 5), min_size=1, max_size=7).filter(any).map(tuple)


@settings(max_examples=50, deadline=None)
@given(blocks=BLOCKS, window=st.integers(1, 9), seed=st.integers(0, 3))
def test_one_lane_sees_every_row_once_an_epoch(blocks, window, seed):
    total = sum(blocks)
    order = Order(blocks, 1, 1, window * len(blocks), seed)
    seen = Counter(order.rows(step, 0)[0] for step in range(total * window))
    assert set(seen.values()) == {window}
    assert set(seen) == {(block, row) for block, count in enumerate(blocks) for row in range(count)}


@settings(max_examples=50, deadline=None)
@given(
    blocks=BLOCKS, lanes=st.integers(1, 4), micro=st.integers(1, 6), window=st.integers(1, 4), step=st.integers(0, 40)
)
def test_any_step_can_be_asked_for_without_the_steps_before_it(blocks, lanes, micro, window, step):
    walked, jumped = (Order(blocks, lanes, micro, window, 7) for _ in range(2))
    for before in range(step):
        for lane in range(lanes):
            walked.rows(before, lane)
    for lane in range(lanes):
        assert walked.rows(step, lane) == jumped.rows(step, lane)
        assert len(jumped.rows(step, lane)) == micro


def test_over_many_epochs_every_row_comes_up_equally_often_whatever_the_number_of_lanes():
    order = Order((4,) * 6, lanes=4, micro=2, window=3, seed=1)
    # 4 lanes × 2 rows × 36 steps = 288 rows = 12 epochs of 24; each lane has then used up whole windows of 12 rows
    seen = Counter(pair for step in range(36) for lane in range(4) for pair in order.rows(step, lane))
    assert set(seen.values()) == {12}


def test_a_block_is_read_for_one_lane_at_a_time():
    order = Order((8,) * 12, lanes=3, micro=4, window=2, seed=0)
    first_epoch = {lane: {block for step in range(8) for block, _ in order.rows(step, lane)} for lane in range(3)}
    assert sorted(block for blocks in first_epoch.values() for block in blocks) == list(range(12))


def test_a_window_mixes_its_blocks_and_no_others():
    order = Order((10,) * 8, lanes=1, micro=20, window=2, seed=0)
    windows = [{block for block, _ in order.rows(step, 0)} for step in range(4)]
    assert [len(blocks) for blocks in windows] == [2, 2, 2, 2]
    mixed = [block for block, _ in order.rows(0, 0)]
    assert mixed not in (sorted(mixed), sorted(mixed, reverse=True))


def test_epochs_are_shuffled_anew_and_seeds_differ():
    def epoch(seed: int, number: int) -> list[tuple[int, int]]:
        return Order((3, 3, 3), 1, 9, 3, seed).rows(number, 0)

    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_same_rows_are_seen_at_every_step_whatever_the_number_of_workers(ranks):
    order = Order((5, 6, 7, 8), lanes=4, micro=3, window=2, seed=3)
    for step in range(10):
        expected = sorted(pair for lane in range(4) for pair in order.rows(step, lane))
        seen = [
            pair
            for rank in range(ranks)
            for lane, weight in Group(rank, ranks).lanes(4)
            if weight
            for pair in order.rows(step, lane)
        ]
        assert sorted(seen) == expected


def test_every_rank_does_equally_many_micro_batches():
    counts = [len(Group(rank, 3).lanes(4)) for rank in range(3)]
    assert counts == [2, 2, 2]
    assert sum(weight for rank in range(3) for _, weight in Group(rank, 3).lanes(4)) == 4


def test_the_order_is_the_same_for_ever():
    assert shuffled(8, "epoch", 0, 0).tolist() == [5, 6, 3, 2, 4, 1, 7, 0]
    assert derive_seed("noise", 0, 0, 0) == 4199948398154688786
    assert derive_seed("noise", 1, 12) != derive_seed("noise", 11, 2)
    order = Order((7, 0, 3, 5, 8, 8, 1), lanes=3, micro=4, window=2, seed=9)
    rows = [pair for step in range(100) for lane in range(3) for pair in order.rows(step, lane)]
    told = "".join(f"{block},{row};" for block, row in rows)
    assert hashlib.sha256(told.encode()).hexdigest().startswith("736e79780b0f3233")


def test_a_selection_that_keeps_nothing_is_refused():
    with pytest.raises(Refused, match="no row to train on"):
        Order((0, 0), 1, 1, 1, 0)
