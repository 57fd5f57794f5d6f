"""The banded look-up finds every near pair and no other, whatever the number of tables."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.rules import hamming
from pipelines.rules.hamming import BITS, MOST, blocks, keys, near, pairs, repeats

DISTANCES = st.integers(0, MOST)
BASES = (0, 2**64 - 1, 0xAAAA_AAAA_AAAA_AAAA)


@st.composite
def near_hashes(draw: st.DrawFn) -> list[int]:
    """Hashes that lie near each other, so that pairs at, just within and just beyond any threshold are common."""
    flipped = st.sets(st.integers(0, BITS - 1), max_size=MOST + 2)
    made = draw(st.lists(st.tuples(st.sampled_from(BASES), flipped), max_size=24))
    return [base ^ sum(1 << bit for bit in bits) for base, bits in made]


def every_pair(values: list[int], distance: int) -> set[tuple[int, int]]:
    """By comparing all with all."""
    both = itertools.combinations(range(len(values)), 2)
    return {(i, j) for i, j in both if (values[i] ^ values[j]).bit_count() <= distance}


@settings(deadline=None, max_examples=60)
@given(near_hashes(), DISTANCES, st.integers(0, 5))
def test_no_near_pair_is_missed_and_no_other_is_found(values, distance, more):
    chosen = hamming.blocks
    hamming.blocks = lambda count, distance: distance + 1 + more  # every scheme that `blocks` may choose
    try:
        found = pairs(np.array(values, np.uint64), distance)
    finally:
        hamming.blocks = chosen
    assert len(found) == len(set(found))
    assert set(found) == every_pair(values, distance)
    assert found == sorted(found, key=lambda pair: pair[::-1])


@settings(deadline=None, max_examples=60)
@given(near_hashes(), DISTANCES)
def test_a_hash_goes_exactly_where_one_before_it_that_stays_is_near(values, distance):
    kept: list[int] = []
    expected = []
    for value in values:
        expected.append(any((value ^ one).bit_count() <= distance for one in kept))
        kept += [] if expected[-1] else [value]
    assert repeats(np.array(values, np.uint64), distance).tolist() == expected


@settings(deadline=None, max_examples=60)
@given(near_hashes(), near_hashes(), DISTANCES)
def test_near_to_a_set_is_near_to_one_of_it(values, known, distance):
    expected = [any((value ^ one).bit_count() <= distance for one in known) for value in values]
    assert near(np.array(values, np.uint64), np.array(known, np.uint64), distance).tolist() == expected


@pytest.mark.parametrize("distance", range(MOST + 1))
def test_whichever_bits_differ_some_table_does_not_look_at_them(distance):
    random = np.random.default_rng(distance)
    for parts in range(distance + 1, distance + 7):
        for _ in range(20):
            one = random.integers(2**64, dtype=np.uint64)
            flipped = sum(1 << int(bit) for bit in random.choice(BITS, distance, replace=False))
            tables = list(keys(np.array([one, one ^ np.uint64(flipped)]), parts, distance, 44))
            assert any(key[0] == key[1] for key in tables)


def test_crowds_of_near_hashes_are_judged_as_all_others_are():
    """Nearly every two of them are near, so that comparing all with all would never end on a large list."""
    random = np.random.default_rng(0)
    bits = np.uint64(1) << random.integers(BITS, size=(6, 6000)).astype(np.uint64)
    values = np.bitwise_or.reduce(bits[: 1 + 6 // 2], axis=0)
    assert pairs(values, 4, 64 * len(values)) is None
    kept: list[int] = []
    expected = []
    for value in values.tolist():
        expected.append(bool((np.bitwise_count(np.array(kept, np.uint64) ^ np.uint64(value)) <= 4).any()))
        kept += [] if expected[-1] else [value]
    assert repeats(values, 4).tolist() == expected


def test_more_hashes_mean_more_tables():
    chosen = [blocks(10**power, 4) for power in (3, 5, 7, 9)]
    assert chosen == sorted(chosen)
    assert chosen[0] < chosen[-1]


def test_many_hashes_of_one_bucket_are_all_compared():
    values = np.arange(200, dtype=np.uint64)
    assert set(pairs(values, 2)) == every_pair(values.tolist(), 2)
