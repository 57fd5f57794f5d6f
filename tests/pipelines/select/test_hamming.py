"""The banded look-up finds every near pair and no other, whatever the number of tables."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.select.rules import hamming
from pipelines.select.rules.hamming import BITS, MOST, Scheme, near, pairs, repeats, scheme, schemes, tables

DISTANCES = st.integers(0, MOST)
SCHEMES = DISTANCES.flatmap(
    lambda distance: st.sampled_from([one for one in schemes(distance) if len(one.choices()) < 40])
)
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
@given(near_hashes(), SCHEMES, st.sampled_from([1, 3, 100]), st.sampled_from([0, 8]))
def test_no_near_pair_is_missed_and_no_other_is_found(values, chosen, at_once, dense):
    distance = chosen.distance
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hamming, "scheme", lambda count, distance: chosen)  # whichever it may choose
        patched.setattr(hamming, "_AT_ONCE", at_once)
        patched.setattr(hamming, "_DENSE", dense)
        found = [tuple(pair) for pair in pairs(np.array(values, np.uint64), distance).tolist()]
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
def test_whichever_parts_differ_some_key_has_none_of_them(distance):
    """The pigeonhole that makes the search exact, for every scheme, by trying all sets of parts of small ones."""
    random = np.random.default_rng(distance)
    for one in schemes(distance):
        keys = [frozenset(key) for key in one.choices()]
        sets = itertools.combinations(range(one.parts), distance)
        if math.comb(one.parts, distance) > 3000:
            sets = (tuple(random.choice(one.parts, distance, replace=False).tolist()) for _ in range(300))
        for differing in sets:
            assert any(key.isdisjoint(differing) for key in keys), (one, differing)


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


def test_more_hashes_mean_longer_keys():
    chosen = [scheme(10**power, 4) for power in (3, 5, 7, 9)]
    lengths = [one.key / one.parts for one in chosen]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]
    assert Scheme(4, 1, 2).parts == 6  # Manku's: two of six parts, 15 tables
    assert len(Scheme(4, 1, 2).choices()) == 15


def test_many_hashes_of_one_bucket_are_all_compared():
    values = np.arange(200, dtype=np.uint64)
    assert set(map(tuple, pairs(values, 2).tolist())) == every_pair(values.tolist(), 2)


@settings(deadline=None, max_examples=60)
@given(near_hashes(), DISTANCES, st.integers(5, 40))
def test_what_a_word_says_of_a_hash_is_true(values, distance, bits):
    """Words of one key differ, above the index, in no more bits than their hashes do."""
    hashes = np.array(values, np.uint64)
    for one in schemes(distance)[:6]:
        for table in itertools.islice(tables(1 << bits, one), 5):
            words = np.empty_like(hashes)
            table.write(hashes, words)
            words.sort()
            index = (words & table.index).astype(int)
            assert sorted(index) == list(range(len(values)))
            apart = words[1:] ^ words[:-1]
            truly = np.bitwise_count(hashes[index[1:]] ^ hashes[index[:-1]])
            same = apart < table.bucket
            assert (same == (table.key(hashes[index[1:]]) == table.key(hashes[index[:-1]]))).all()
            assert (np.bitwise_count(apart >> table.bits)[same] <= truly[same]).all()
            telling = np.empty(len(words), np.uint32)
            table.tell(words, telling)
            told = telling[1:] ^ telling[:-1]
            assert (told[same] < table.meeting).all()
            assert (np.bitwise_count(told)[same] <= truly[same]).all()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**63]), max_size=40))
def test_equal_hashes_leave_the_first(values):
    expected = [value in values[:place] for place, value in enumerate(values)]
    assert repeats(np.array(values, np.uint64), 0).tolist() == expected
