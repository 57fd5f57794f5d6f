"""Averages of any length after training, from snapshots of two (Karras et al. 2024, arXiv 2312.02696, section 3).

A power-function average gives the weights of update τ, at update t, the share ∝ τ^γ: unlike an exponential one, whose
reach is a number of updates, its reach is a fraction of the training, and the random start is never in it. Its length
σ_rel is the deviation of that share, as a fraction of t. Snapshots of two such averages span, nearly, the averages of
all other lengths: the one that is wanted is the combination of them whose shares of the updates come closest.

Where the paper takes integrals over a continuous time, the shares of the single updates are summed here, which is exact
in short runs too; and the combination's shares sum to one, so that what never changed stays bit for bit what it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from torch import Tensor

CHUNK = 1 << 15
"""Updates whose shares are held at once."""


class Average(NamedTuple):
    """A power-function average: after how many updates, and of which relative length σ_rel."""

    updates: int
    length: float


@cache
def exponent(length: float) -> float:
    """γ ≥ 0 of a relative length σ_rel in (0, 12^-½]: (γ + 2)² (γ + 3) σ² = γ + 1."""
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def decay(length: float, updates: int) -> float:
    """Share that the average keeps of itself at the update-th update (1, 2, …), (1 - 1/t)^(γ + 1): 0 at the first."""
    return float((1 - 1 / updates) ** (exponent(length) + 1))


def shares(averages: Sequence[Average], first: int, last: int) -> np.ndarray:
    """Share of the weights after each update τ in (first, last] in each average, float64 [last - first, averages].

    (τ/t)^(γ+1) - ((τ-1)/t)^(γ+1), which is what the decays above multiply to; 0 after the average's own time.
    """
    edges = np.arange(first, last + 1, dtype=np.float64)[:, None]
    ends = np.array([average.updates for average in averages], dtype=np.float64)
    powers = np.array([exponent(average.length) + 1 for average in averages])
    return np.diff(np.minimum(edges / ends, 1) ** powers, axis=0)


def combination(kept: Sequence[Average], wanted: Average) -> tuple[np.ndarray, float]:
    """Factors [kept] that sum to 1, such that the kept averages times them are nearest to the wanted one; and how far
    their shares of the updates miss its own, as a fraction of their norm.
    """
    count, last = len(kept), max(average.updates for average in (*kept, wanted))
    gram = np.zeros((count + 1, count + 1))
    for first in range(0, last, CHUNK):
        part = shares([*kept, wanted], first, min(first + CHUNK, last))
        gram += part.T @ part
    # Differences to the last average kept, of which any sum leaves the factors' total at 1.
    turn = np.eye(count + 1)[: count - 1] - np.eye(count + 1)[count - 1]
    aim = np.eye(count + 1)[count] - np.eye(count + 1)[count - 1]
    inner, outer = turn @ gram @ turn.T, turn @ gram @ aim
    scale = 1 / np.sqrt(np.maximum(np.diag(inner), np.finfo(float).tiny))
    found = scale * np.linalg.lstsq(scale[:, None] * inner * scale, scale * outer, rcond=1e-13)[0]
    factors = np.append(found, 1 - found.sum())
    missed = np.append(factors, -1.0)
    return factors, float(np.sqrt(max(missed @ gram @ missed, 0.0) / gram[count, count]))


def combined(
    factors: Sequence[float], averages: Iterable[dict[str, Tensor]], base: dict[str, Tensor]
) -> dict[str, Tensor]:
    """base + Σ factor · (average - base), tensor by tensor; the averages are read one at a time.

    With factors that sum to 1 it is Σ factor · average, whatever base is, and exactly base where all are equal.
    """
    out = {name: tensor.clone() for name, tensor in base.items()}
    for factor, average in zip(factors, averages, strict=True):
        for name, tensor in out.items():
            tensor.add_(average[name] - base[name], alpha=float(factor))
    return out
