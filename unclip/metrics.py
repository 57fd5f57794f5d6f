"""Metrics of pictures with their uncertainty: intervals, CMMD, Fréchet distance, precision and recall. NumPy alone.

Of one picture: CLIP score. Of a set beside a set of true ones: CMMD, Fréchet distance, precision and recall. Of all:
intervals and paired differences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unclip.errors import Refused

Z_95 = 1.959963984540054
"""The standard normal's 97.5 % quantile."""


class Estimate(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


class Coverage(NamedTuple):
    """How two sets of pictures overlap."""

    precision: float
    """Share of the drawn ones that could be true ones: fidelity."""
    recall: float
    """Share of the true ones that could be drawn ones: diversity."""


def wilson(successes: int, trials: int) -> Estimate:
    """A proportion with its 95 % interval (Wilson 1927), which stays in [0, 1] and is honest near 0 and 1."""
    if not 0 <= successes <= trials or trials < 1:
        raise Refused(f"{successes} of {trials} is no proportion")
    rate, z2 = successes / trials, Z_95**2
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials**2))
    return Estimate(rate, max(0.0, centre - half), min(1.0, centre + half))


def cosine(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """Row-wise cosine of [n, d] and [n, d] → [n], in [-1, 1]: with image and text embeddings, the CLIP score."""
    a, b = _unit(first), _unit(second)
    if a.shape != b.shape:
        raise Refused(f"embeddings of shapes {a.shape} and {b.shape} cannot be compared row by row")
    return (a * b).sum(1)


def cmmd(first: ArrayLike, second: ArrayLike, sigma: float = 10.0) -> float:
    """1000 × MMD² between two sets of CLIP embeddings [n, d] and [m, d] (Jayasumana et al. 2024, arXiv 2401.09603).

    Embeddings are normalised here; the kernel is Gaussian with deviation `sigma`; the estimator is the biased one of
    Gretton et al. 2012, equation 5, as in the authors' code: at least 0, and 0 for a set with itself.
    """
    a, b = _unit(first), _unit(second)
    if a.shape[1] != b.shape[1]:
        raise Refused(f"CMMD compares embeddings of one width, not {a.shape[1]} and {b.shape[1]}")

    def kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        # Rows have unit length, so their squared distance is 2 − 2·cosine.
        return float(np.exp(-(2 - 2 * x @ y.T) / (2 * sigma**2)).mean())

    return 1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))


def frechet(first: ArrayLike, second: ArrayLike) -> float:
    """Fréchet distance |μ − ν|² + tr(S + T − 2·(S·T)^½) of two sets of features [n, d] and [m, d] (Heusel et al. 2017).

    With Inception's features it is the FID, with raw CLIP embeddings CLIP-FD; in the features' squared units, so that
    lengths count. n, m ≥ 2. It is biased upward, the more the fewer rows there are beside d: compare equal numbers.
    """
    a, b = _sets(first, second, "the Fréchet distance", 2)
    # tr((S·T)^½) = tr((S^½·T·S^½)^½) is the sum of the singular values of T^½·S^½: of symmetric roots alone, which
    # exist where S·T is singular too, as it is for fewer rows than dimensions.
    cross = np.linalg.svd(_root(np.cov(b.T)) @ _root(np.cov(a.T)), compute_uv=False).sum()
    spread = a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum() - 2 * cross
    return max(0.0, float(np.square(a.mean(0) - b.mean(0)).sum() + spread))


def coverage(drawn: ArrayLike, true: ArrayLike, neighbours: int = 3) -> Coverage:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations 1 and 2) of features [n, d] and [m, d].

    A picture could belong to a set where it lies in the ball of one of the set's pictures, which reaches to that one's
    k-th nearest neighbour in its set, k = `neighbours`. Both depend on n, m and k: compare equal numbers. Refused with
    no more than k rows.
    """
    if neighbours < 1:
        raise Refused(f"precision and recall take at least 1 neighbour, not {neighbours}")
    a, b = _sets(drawn, true, f"precision and recall with {neighbours} neighbours", neighbours + 1)
    return Coverage(_covered(a, b, neighbours), _covered(b, a, neighbours))


def paired_difference(new: ArrayLike, old: ArrayLike, seed: int = 0, resamples: int = 10_000) -> Estimate:
    """Mean of new − old, item by item, with its 95 % interval by the percentile bootstrap over items.

    new, old: [n] scores of the same items in the same order, numbers or booleans.
    """
    difference = _pair(new, old)
    rng = np.random.default_rng(seed)
    count = len(difference)
    means = [difference[rng.integers(0, count, count)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(difference.mean()), float(low), float(high))


def mcnemar(new: Sequence[bool], old: Sequence[bool]) -> float:
    """Two-sided exact p that two yes/no judgements of the same items differ by chance alone (McNemar 1947)."""
    difference = _pair(new, old)
    won, lost = int((difference > 0).sum()), int((difference < 0).sum())
    decided = won + lost
    if decided == 0:
        return 1.0
    # Summed as integers: for hundreds of items the single terms underflow as floats.
    tail = sum(math.comb(decided, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2**decided)


def _pair(new: ArrayLike, old: ArrayLike) -> NDArray[np.float64]:
    a, b = np.asarray(new, np.float64), np.asarray(old, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise Refused(f"a paired comparison needs two equally long lists of scores, not {a.shape} and {b.shape}")
    return a - b


def _unit(embeddings: ArrayLike) -> NDArray[np.float64]:
    rows = np.asarray(embeddings, np.float64)
    if rows.ndim != 2 or not len(rows):
        raise Refused(f"embeddings must be a table [n, d] with at least one row, not {rows.shape}")
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _sets(
    first: ArrayLike, second: ArrayLike, what: str, least: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < least:
        raise Refused(f"{what} takes two tables of one width and at least {least} rows, not {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise Refused(f"{what} takes finite features, and some are NaN or infinite")
    return a, b


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """The symmetric root of a covariance, [d, d] (or a number, as np.cov has it for d = 1)."""
    values, axes = np.linalg.eigh(np.atleast_2d(covariance))
    return (axes * np.sqrt(np.maximum(values, 0))) @ axes.T


BLOCK = 1 << 24
"""Distances held at a time: 128 MiB."""


def _covered(points: NDArray[np.float64], centres: NDArray[np.float64], neighbours: int) -> float:
    """Share of the points that lie in the ball of a centre."""
    # A row's nearest row in its own set is itself, so the k-th neighbour stands at place k.
    reach = np.concatenate(
        [np.partition(part, neighbours, axis=1)[:, neighbours] for part in _distances(centres, centres)]
    )
    reach *= 1 + 1e-9  # a ball's surface belongs to it, whichever way the last bits fell
    return float(np.concatenate([(part <= reach).any(1) for part in _distances(points, centres)]).mean())


def _distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Squared distances from every row of a to every row of b, some rows of a at a time."""
    origin = b.mean(0)
    others = b - origin
    rows = max(1, BLOCK // len(b))
    for first in range(0, len(a), rows):
        part = a[first : first + rows] - origin
        lengths = np.square(part).sum(1)[:, None] + np.square(others).sum(1)
        square = lengths - 2 * part @ others.T
        # What this leaves of equal rows is rounding, and equal is to be equal.
        square[square < 1e-12 * lengths] = 0
        yield square
