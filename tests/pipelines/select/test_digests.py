"""Repeated digests are found exactly, whether they wait in memory or on disk."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.select.rules import digests as repeats
from pipelines.select.rules.scores import _top

DIGESTS = st.tuples(st.sampled_from([0, 1, 255, 256, 2**40, 2**64 - 1]), st.sampled_from([0, 1, 2**40]))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(DIGESTS, max_size=8), max_size=8), st.sampled_from([1, 5, 1000]))
def test_a_digest_is_repeated_exactly_where_it_stands_before(shards, waiting):
    seen: set[tuple[int, int]] = set()
    expected = []
    for shard in shards:
        expected.append([])
        for digest in shard:
            expected[-1].append(digest in seen)
            seen.add(digest)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(repeats, "WAITING", waiting)
        found = repeats.repeated(np.array(shard, np.uint64).reshape(-1, 2) for shard in shards)
        assert [verdict.tolist() for verdict in found] == expected


@settings(deadline=None)
@given(st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 0.5, np.inf]), max_size=20), st.floats(0, 1, exclude_min=True))
def test_a_top_fraction_is_that_of_a_stable_sort(scores, fraction):
    values = np.array(scores, np.float32)
    best = np.argsort(-values, kind="stable")[: int(np.ceil(fraction * len(values)))]
    assert np.flatnonzero(_top(values, fraction)).tolist() == sorted(best.tolist())
