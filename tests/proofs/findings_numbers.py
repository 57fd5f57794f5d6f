"""The findings' numbers: proportions with Wilson's intervals, and what is compared picture by picture.

A distance between two sets (Fréchet, recall) has no value for each picture, and a bootstrap's repeated pictures would
change it. Its deviation is the delete-half jackknife's (Shao & Wu 1989): over random halves of the prompts, the same
half on both sides of a difference. Half of n pictures scatter √2 as much as n do, and halves of one set of pictures,
which share it, 1/√2 as much as halves of fresh ones: the two factors cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.proofs.findings import lines
from tests.proofs.findings_cells import AnyCell, Cell
from tests.proofs.findings_scenes import asked
from unclip.metrics import Z_95, Estimate, coverage, frechet, paired_difference, wilson

HALVES = 60
Features = NDArray[np.float64]
Measure = Callable[[Features, Features], float]


def recall(drawn: Features, true: Features) -> float:
    """Share of the true pictures that could be drawn ones (Kynkäänniemi et al. 2019)."""
    return coverage(drawn, true).recall


def precision(drawn: Features, true: Features) -> float:
    """Share of the drawn pictures that could be true ones."""
    return coverage(drawn, true).precision


class Numbers:
    """Everything that was drawn, by cell."""

    def __init__(self, out: Path) -> None:
        self.out, self.lines = out, lines(out)
        self.file, self._combined = cache(self._file), cache(self._jackknifed)

    def line(self, cell: AnyCell) -> dict[str, Any]:
        """A cell's line."""
        return self.lines[cell.name]

    def done(self, *cells: AnyCell) -> bool:
        """Whether all of these are drawn."""
        return all(cell.name in self.lines for cell in cells)

    def _file(self, name: str) -> dict[str, Any]:
        with np.load(self.out / f"{name}.npz") as file:
            return dict(file)

    def true(self, cell: Any, seed: int = 0) -> dict[str, Any]:
        """True pictures of a cell's prompts, at the decoder's size."""
        return self.file(f"true,scenes={getattr(cell, 'scenes', 'single')},seed={seed}")

    def right(self, cell: Any, attribute: str = "all") -> list[int]:
        """Is it right, of every picture."""
        return self.line(cell)["verdicts"][attribute]

    def rate(self, cell: Any, attribute: str = "all") -> Estimate:
        """Share of the pictures in which an attribute is right."""
        found = self.right(cell, attribute)
        return wilson(sum(found), len(found))

    def more(self, new: Any, old: Any, attribute: str = "all") -> Estimate:
        """Difference of two cells' shares, prompt by prompt."""
        return paired_difference(self.right(new, attribute), self.right(old, attribute))

    def distance(self, cell: Any, measure: Measure = frechet, key: str = "embeddings") -> Estimate:
        """A measure of a cell's pictures beside true ones; key `z`: of its z_i beside true ones."""
        return self.combined([(1, cell)], measure, key)

    def nearer(self, new: Any, old: Any, measure: Measure = frechet, key: str = "embeddings") -> Estimate:
        """Difference new - old of a measure."""
        return self.combined([(1, new), (-1, old)], measure, key)

    def combined(self, terms: Sequence[tuple[int, Any]], measure: Measure, key: str = "embeddings") -> Estimate:
        """A sum of measures, some taken away, with its interval."""
        return self._combined(tuple(terms), measure, key)

    def _jackknifed(self, terms: tuple[tuple[int, Any], ...], measure: Measure, key: str) -> Estimate:
        sets = [(sign, self.file(cell.name)[key], self.true(cell)[key]) for sign, cell in terms]
        count = len(sets[0][1])

        def value(rows: Any) -> float:
            return sum(sign * measure(drawn[rows], true[rows]) for sign, drawn, true in sets)

        rng = np.random.default_rng(0)
        halves = [value(rng.permutation(count)[: count // 2]) for _ in range(HALVES)]
        whole, half = value(slice(None)), Z_95 * float(np.std(halves, ddof=1))
        return Estimate(whole, whole - half, whole + half)

    def spread(self, cell: Any) -> float:
        """Deviation of the single object's place within a prompt, as a share of the side: its root mean square."""
        places: dict[str, list[Any]] = {}
        for one, seen in zip(asked("single", cell.count), self.line(cell)["objects"], strict=True):
            if seen:
                places.setdefault(one.prompt, []).append(seen[0][3:])
        variances = [np.var(np.array(some), axis=0, ddof=1).mean() for some in places.values() if len(some) > 1]
        return float(np.sqrt(np.mean(variances)))

    def bound_shapes(self, cell: Cell, wanted: Sequence[dict[str, Any]]) -> tuple[int, int, int]:
        """Of the wanted objects whose colour is there: how often it has its own shape, another object's, or neither."""
        own = other = neither = 0
        for expected, seen in zip(wanted, self.line(cell)["objects"], strict=True):
            shapes = {one["colour"]: one["shape"] for one in expected["objects"]}
            for shape, colour, *_ in seen:
                if colour in shapes:
                    own += shape == shapes[colour]
                    other += shape != shapes[colour] and shape in shapes.values()
                    neither += shape not in shapes.values()
        return own, other, neither


def below(value: Estimate) -> str:
    """Whether a difference that the finding wants below 0 is."""
    return "yes" if value.high < 0 else "no" if value.low > 0 else "undecided"


def above(value: Estimate) -> str:
    """Whether a difference that the finding wants above 0 is."""
    return below(Estimate(-value.value, -value.high, -value.low))


def told(value: Estimate, digits: int = 3, sign: bool = False) -> str:
    """A value with its interval, as in .946 (.923–.963)."""
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    parts = [form.format(part).replace("-", "−") for part in value]
    return f"{parts[0]} ({parts[1]} to {parts[2]})"
