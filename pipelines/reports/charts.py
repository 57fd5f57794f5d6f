"""Histograms as a page draws them: bars, ticks and labels in the units of an SVG, from counts that are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.reports.page import count

WIDTH, HEIGHT = 360.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 8.0, 14.0, 34.0
BARS, FEWEST = 40, 15
"""Bars of a histogram, at most; and at least, with or without rows."""
LEAST = 1.2
"""Height of a bar that has rows, however few."""
_TAIL = 0.002  # of the rows, at either end, may lie in a bar that stands for all that is further out


@dataclass(frozen=True)
class Bar:
    """One bar, from the bottom up: `stays`, then `goes`."""

    x: float
    width: float
    heights: tuple[float, float]
    said: str
    """What stands in its tooltip."""


@dataclass(frozen=True)
class Chart:
    """A histogram, ready to be drawn."""

    title: str
    axis: str
    """What is measured, and in which unit."""
    bars: tuple[Bar, ...]
    across: tuple[tuple[float, str], ...]
    """Ticks of the horizontal axis: place and label."""
    up: tuple[tuple[float, str], ...]
    rows: int
    median: str
    """The value that half of the rows that stay do not exceed, as a person reads it; empty without such rows."""
    median_x: float


@dataclass(frozen=True)
class Scale:
    """What the bins of a count are: bin i reaches from value(i) to value(i + 1)."""

    value: Callable[[float], float]
    label: Callable[[float], str]
    ticks: Callable[[float, float], Sequence[float]]
    """Bins (whole or not) at which a tick stands, between two of them."""
    unit: str = ""
    whole: bool = False
    """Whether values are whole numbers, a bin each."""


def histogram(title: str, axis: str, counts: np.ndarray, scale: Scale, median: str = "") -> Chart | None:
    """counts: int [2, bins], rows that stay and others; None where there are none. median: if known better than that.

    The ends without rows (but for a thin tail, which the last bar stands for) are left out, and bins are put together
    until there are at most BARS.
    """
    total = counts.sum(0)
    if not total.any():
        return None
    first, last = _range(total)
    first = max(0, min(first, (first + last - FEWEST + 1) // 2, len(total) - FEWEST))
    last = min(len(total) - 1, max(last, first + FEWEST - 1))
    merge = max(1, math.ceil((last + 1 - first) / BARS))
    last = min(len(total), first + merge * math.ceil((last + 1 - first) / merge))
    inside = counts[:, first:last].copy()
    inside[:, 0] += counts[:, :first].sum(1)
    inside[:, -1] += counts[:, last:].sum(1)
    edges = [*range(first, last, merge), last]
    sums = np.stack([np.add.reduceat(row, range(0, last - first, merge)) for row in inside])
    highest = _nice(float(sums.sum(0).max()))
    across, up = (WIDTH - LEFT - RIGHT) / (last - first), (HEIGHT - TOP - BOTTOM) / highest

    def x(at: float) -> float:
        return LEFT + (at - first) * across

    bars = []
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        stays, goes = (int(value) for value in sums[:, number])
        under, over = counts[:, :first].any() and number == 0, counts[:, last:].any() and high == last
        said = f"{_between(scale, low, high, bool(under), bool(over))}: {count(stays)} stay, {count(goes)} do not"
        heights = tuple(max(value * up, LEAST) if value else 0.0 for value in (stays, goes))
        bars.append(Bar(x(low), max(across * (high - low) - 0.8, 0.6), (heights[0], heights[1]), said))
    ticks = [at for at in scale.ticks(first, last) if first <= at <= last - scale.whole]
    marks = tuple((x(at + 0.5 * scale.whole), scale.label(scale.value(at))) for at in ticks)  # a whole value is a bar
    steps = tuple((HEIGHT - BOTTOM - value * up, _short(value)) for value in _steps(highest))
    middle = median_bin(counts[0])
    about = "" if scale.whole else "about "
    if middle is not None and not median:
        median = f"{about}{scale.label(scale.value(middle + 0.5 * (not scale.whole)))}{scale.unit}"
    place = x(min(max(middle + 0.5, first), last)) if middle is not None else 0.0
    return Chart(title, axis, tuple(bars), marks, steps, int(total.sum()), median if middle is not None else "", place)


def logarithmic(per_octave: int, label: Callable[[float], str], *, origin: float = 0.0, unit: str = "") -> Scale:
    """Bins a doubling; bin `origin` begins at 1. Ticks at powers of two, few enough to be read."""

    def ticks(first: float, last: float) -> Sequence[float]:
        octaves = (last - first) / per_octave
        step = per_octave * max(1, math.ceil(octaves / 7))
        start = origin + math.ceil((first - origin) / step) * step
        return np.arange(start, last + 1e-9, step).tolist()

    return Scale(lambda at: 2 ** ((at - origin) / per_octave), label, ticks, unit)


def linear(width: float, label: Callable[[float], str], *, begin: float = 0.0, unit: str = "") -> Scale:
    """Bins of a width, the first of which begins at `begin`."""

    def ticks(first: float, last: float) -> Sequence[float]:
        low, high = begin + first * width, begin + last * width
        step = _nice((high - low) / 5)
        step = math.ceil(step) if whole else step
        return [(value - begin) / width for value in np.arange(math.ceil(low / step - 1e-9) * step, high + 1e-9, step)]

    whole = width == 1.0
    return Scale(lambda at: begin + at * width, label, ticks, unit, whole)


def binned(counts: np.ndarray, per_octave: int) -> np.ndarray:
    """Counts of whole numbers, int [2, n], as those of bins `per_octave` a doubling; 0 counts as 1."""
    bins = np.floor(per_octave * np.log2(np.maximum(np.arange(counts.shape[1]), 1)) + 1e-9).astype(np.int64)
    return np.stack([np.bincount(bins, row, per_octave * 24).astype(np.int64) for row in counts])


def _range(total: np.ndarray) -> tuple[int, int]:
    """First and last bin that are drawn."""
    beyond = _TAIL * total.sum()
    low, high = np.cumsum(total), np.cumsum(total[::-1])
    first, last = int(np.argmax(low > beyond)), len(total) - 1 - int(np.argmax(high > beyond))
    used = np.flatnonzero(total)
    near = max(2, (last - first) // 4)  # a tail that is not long is drawn whole
    return (
        int(used[0]) if first - used[0] <= near else first,
        int(used[-1]) if used[-1] - last <= near else last,
    )


def _between(scale: Scale, low: int, high: int, under: bool, over: bool) -> str:
    if scale.whole:
        first, last = scale.label(scale.value(low)), scale.label(scale.value(high - 1))
        said = first if first == last else f"{first}–{last}"
        return f"{first} or more" if over else f"{said}{scale.unit}"
    first, last = scale.label(scale.value(low)), scale.label(scale.value(high))
    if under or over:
        return f"under {last}{scale.unit}" if under else f"over {first}{scale.unit}"
    return f"{first}–{last}{scale.unit}"


def median_bin(counts: np.ndarray) -> int | None:
    """The bin, of int [bins], that the lower median of what was counted lies in; None of nothing."""
    total = int(counts.sum())
    return int(np.searchsorted(np.cumsum(counts), (total + 1) // 2)) if total else None


def _nice(value: float) -> float:
    """The next 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-12)))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= value * (1 - 1e-9))


def _steps(highest: float) -> list[float]:
    """Ticks from 0 to the highest, four or five; whole numbers."""
    step = max(1.0, _nice(highest / 5))
    return [value for value in np.arange(0, highest + 1e-9, step).tolist() if value == round(value)]


def _short(value: float) -> str:
    """A count on an axis: 1 500, 20 k, 3 M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= 10 * size or (value >= size and unit == "M"):
            return f"{value / size:g}\u202f{unit}"
    return count(value)
