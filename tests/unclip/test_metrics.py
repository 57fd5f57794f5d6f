"""Numbers against independent sources: scipy, closed forms, sums written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import linalg, stats
from scipy.spatial.distance import cdist

from unclip import metrics
from unclip.errors import Refused
from unclip.metrics import cmmd, cosine, coverage, frechet, mcnemar, paired_difference, wilson


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


@pytest.mark.parametrize("width", [1, 6, 40])
def test_the_frechet_distance_is_the_one_by_the_matrix_square_root(width):
    """The formula of Heusel et al. 2017 as their code computes it, by scipy's sqrtm; also where S·T is singular."""
    rng = np.random.default_rng(width)
    x = rng.normal(size=(200, width)) @ rng.normal(size=(width, width))
    y = rng.normal(size=(30, width)) @ rng.normal(size=(width, width)) + 0.5
    s, t = np.atleast_2d(np.cov(x.T)), np.atleast_2d(np.cov(y.T))
    root = linalg.sqrtm(s @ t).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root)
    # With 30 rows of 40 dimensions sqrtm takes the roots of eigenvalues that are 0 up to rounding.
    assert frechet(x, y) == pytest.approx(expected, rel=1e-9 if width < 30 else 1e-4)
    assert frechet(x, y) == pytest.approx(frechet(y, x), rel=1e-9)


def exactly(mean, covariance):
    """2·d points whose mean and covariance (by n − 1) are those given."""
    width = len(mean)
    cross = np.concatenate([np.eye(width), -np.eye(width)]) * math.sqrt((2 * width - 1) / 2)
    return mean + cross @ np.linalg.cholesky(covariance).T


def test_the_frechet_distance_of_gaussians_has_a_closed_form():
    """Covariances that commute: Σ (√λ − √μ)² beside the distance of the means (Dowson & Landau 1982)."""
    axes = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
    s, t = (axes @ np.diag(values) @ axes.T for values in ([4.0, 1.0, 0.25], [1.0, 9.0, 0.25]))
    found = frechet(exactly([0, 0, 0], s), exactly([1, 2, 2], t))
    assert found == pytest.approx(9 + (2 - 1) ** 2 + (1 - 3) ** 2 + 0)
    assert frechet(exactly([0, 0, 0], s), exactly([0, 0, 0], s)) == pytest.approx(0, abs=1e-12)
    assert frechet(exactly([0, 0, 0], s), 3 * exactly([0, 0, 0], s)) == pytest.approx(4 * np.trace(s))


@given(
    hnp.arrays(np.float64, st.tuples(st.integers(5, 12), st.just(3)), elements=st.integers(-3, 3)),
    hnp.arrays(np.float64, st.tuples(st.integers(5, 12), st.just(3)), elements=st.integers(-3, 3)),
    st.integers(1, 4),
)
def test_precision_and_recall_are_those_of_the_definition(drawn, true, neighbours):
    """Ball by ball, with scipy's distances; whole numbers, so that ties and equal pictures come often."""

    def share(points, centres):
        reach = [np.sort(np.delete(row, place))[neighbours - 1] for place, row in enumerate(cdist(centres, centres))]
        return np.mean([any(d <= r + 1e-9 for d, r in zip(row, reach, strict=True)) for row in cdist(points, centres)])

    # Away from the origin, where careless sums of squares lose the small distances.
    found = coverage(drawn + 1000.5, true + 1000.5, neighbours)
    assert found == (pytest.approx(share(drawn, true)), pytest.approx(share(true, drawn)))


def test_a_generator_that_forgets_half_keeps_its_precision_and_loses_half_of_its_recall():
    rng = np.random.default_rng(0)
    here, there = rng.normal(size=(2, 300, 2)) + np.array([[[0.0, 0.0]], [[50.0, 0.0]]])
    true = np.concatenate([here, there])
    assert coverage(true, true) == (1, 1)
    assert coverage(true + np.array([0, 500]), true) == (0, 0)
    forgetful = coverage(rng.normal(size=(300, 2)), true)
    assert forgetful.precision > 0.9
    assert 0.45 < forgetful.recall <= 0.5
    # One point again and again is faithful and covers nothing.
    assert coverage(np.repeat(here[:1], 300, 0), true) == (1, pytest.approx(1 / 600))


def test_precision_and_recall_do_not_depend_on_the_block(monkeypatch):
    rng = np.random.default_rng(2)
    drawn, true = rng.normal(size=(40, 4)), rng.normal(size=(50, 4)) + 0.5
    whole = coverage(drawn, true)
    monkeypatch.setattr(metrics, "BLOCK", 170)
    assert coverage(drawn, true) == whole
    assert 0 < whole.recall < 1


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


@pytest.mark.parametrize(
    ("impossible", "named"),
    [
        (lambda: frechet([[1.0]], [[1.0], [2.0]]), r"at least 2 rows, not \(1, 1\)"),
        (lambda: frechet([[1.0], [2.0]], [[1.0, 2.0], [2.0, 3.0]]), "one width"),
        (lambda: frechet([[1.0], [math.nan]], [[1.0], [2.0]]), "NaN"),
        (lambda: coverage(np.zeros((3, 2)), np.zeros((9, 2))), r"at least 4 rows, not \(3, 2\)"),
        (lambda: coverage(np.zeros((3, 2)), np.zeros((9, 2)), 0), "at least 1 neighbour, not 0"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(impossible, named):
    with pytest.raises(Refused, match=named):
        impossible()
