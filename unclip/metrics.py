"""Numbers about pictures, and how sure they are: intervals, CMMD, CLIP score, paired differences. NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
