"""Numbers against independent sources: scipy, closed forms, sums written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from unclip.errors import Refused
from unclip.metrics import cmmd, cosine, mcnemar, paired_difference, wilson


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (1, 3), (450, 500), (0, 1), (37, 91)])
def test_wilson_is_scipys(successes, trials):
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, "wilson")
    found = wilson(successes, trials)
    assert found.value == successes / trials
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)


def test_impossible_proportions_are_refused():
    for successes, trials in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(Refused, match="no proportion"):
            wilson(successes, trials)


def test_cosine_is_row_wise_and_ignores_length():
    assert cosine([[3, 0], [1, 1], [2, 0]], [[7, 0], [0, 5], [-1, 0]]) == pytest.approx([1, math.sqrt(0.5), -1])


def test_cmmd_of_two_points_has_a_closed_form():
    # One unit vector each, at right angles: squared distance 2, so MMD² = 2 − 2·exp(−2 / (2·10²)).
    assert cmmd([[1.0, 0.0]], [[0.0, 5.0]]) == pytest.approx(1000 * (2 - 2 * math.exp(-0.01)))


def test_cmmd_is_the_sum_over_all_pairs():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(7, 5)), rng.normal(size=(4, 5)) + 1

    def mean(a, b):
        total = 0.0
        for i in a:
            for j in b:
                distance = sum(
                    (p / math.dist(i, [0] * 5) - q / math.dist(j, [0] * 5)) ** 2 for p, q in zip(i, j, strict=False)
                )
                total += math.exp(-distance / 200)
        return total / (len(a) * len(b))

    assert cmmd(x, y) == pytest.approx(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), rel=1e-9)


def test_cmmd_is_zero_for_a_set_with_itself_and_grows_with_distance():
    x = np.random.default_rng(0).normal(size=(50, 8))
    shift = np.eye(8)[0]
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)
    assert 0 < cmmd(x, x + shift) < cmmd(x, x + 3 * shift)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_the_exact_binomial_test_of_the_discordant_pairs(pairs):
    new, old = [a for a, _ in pairs], [b for _, b in pairs]
    won, lost = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    expected = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert mcnemar(new, old) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(new, old) == mcnemar(old, new)


def test_mcnemar_of_thousands_of_items_is_a_number():
    assert mcnemar([True] * 3000, [False] * 3000) == 0
    assert mcnemar([True, False] * 1500, [False, True] * 1500) == 1


def test_a_paired_difference_covers_the_truth_and_is_repeatable():
    rng = np.random.default_rng(5)
    old = rng.normal(size=400)
    new = old + 0.2 + 0.5 * rng.normal(size=400)
    found = paired_difference(new, old, resamples=2000)
    normal = stats.t.interval(0.95, 399, (new - old).mean(), stats.sem(new - old))
    assert found.value == pytest.approx((new - old).mean())
    assert (found.low, found.high) == pytest.approx(normal, abs=0.01)
    assert found == paired_difference(new, old, resamples=2000)
    assert paired_difference(old, old, resamples=100) == (0, 0, 0)


def test_lists_of_different_length_are_refused():
    with pytest.raises(Refused, match="two equally long lists"):
        mcnemar([True], [True, False])
    with pytest.raises(Refused, match="one width"):
        cmmd([[1.0]], [[1.0, 2.0]])
