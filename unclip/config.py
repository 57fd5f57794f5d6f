"""What every configuration of this project shares: the mark of a later field, and the ranges of its numbers."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

LATER = {"later": True}
"""Metadata of a field that came after models were trained: at its default it stands in no key, so that theirs hold."""

UNSAID = LATER | {"unsaid": True}
"""The same, and at its default it does not stand in a model's config.json: a model made again has the bytes it had."""

WEIGHTINGS = ("uniform", "min_snr", "min_snr_plus_one")
"""Weights of the squared error over t (unclip/diffusion/losses.py)."""


@dataclass(frozen=True)
class Range:
    """The finite numbers from `least` to `most`, each included unless `above` or `below` says otherwise."""

    least: float
    most: float = math.inf
    above: bool = False
    below: bool = False

    def refuses(self, value: float) -> str:
        """What the value must be and is not, as "at least 1"; "" where it lies in the range."""
        if not math.isfinite(value):
            return f"a finite number {self._lower}"
        if value < self.least or (self.above and value == self.least):
            return self._lower
        if value > self.most or (self.below and value == self.most):
            return f"{'below' if self.below else 'at most'} {_shown(self.most)}"
        return ""

    @property
    def _lower(self) -> str:
        return f"{'above' if self.above else 'at least'} {_shown(self.least)}"


COUNT = Range(1, 2**31 - 1)
WHOLE = Range(0, 2**31 - 1)
WIDTH = Range(1, 2**20)
"""Widths, depths, heads and channels: far beyond any model, and far below what overflows when multiplied."""
DEPTH = Range(1, 1024)
"""Layers or blocks one after another; unlike a width, which memory bounds, each costs time when a model is built."""
SIDE = Range(1, 2**16)
"""Pixels of a side."""
TIMESTEPS = Range(1, 100_000)
SEED = Range(0, 2**53 - 1)
"""Integers that every reader of JSON keeps exactly."""
AMOUNT = Range(0)
POSITIVE = Range(0, above=True)
FRACTION = Range(0, 1)
PART = Range(0, 1, above=True)
"""A fraction of which there must be something."""
SHARE = Range(0, 1, below=True)
"""A decay or a dropout: all of it is impossible."""


def outside(config: Any, **ranges: Range) -> str:
    """What is wrong with the first field that lies outside its range: "steps is 0; it must be at least 1"; else "".

    None is in every range; of a tuple each number is held against it.
    """
    for name, allowed in ranges.items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and (wanted := allowed.refuses(number)):
                shown = list(value) if isinstance(value, tuple) else value
                return f"{name} is {shown}; it must be {wanted}"
    return ""


def mistyped(config_type: type, values: Mapping[str, Any]) -> str:
    """What is wrong with the first value that is not of its field's type: "steps is 'many'; …"; else "".

    For values out of JSON, in which 1 may stand for 1.0, and true is no number.
    """
    hints = get_type_hints(config_type)
    for name, value in values.items():
        if name in hints and not _fits(hints[name], value):
            kind = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
            return f"{name} is {value!r}; it must be of type {kind}"
    return ""


def _fits(hint: Any, value: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(choice, value) for choice in inner)
    if origin is tuple and inner[-1] is Ellipsis:
        return isinstance(value, tuple) and all(_fits(inner[0], item) for item in value)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(_fits, inner, value))
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(inner[0], key) and _fits(inner[1], item) for key, item in value.items()
        )
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint if hint in (int, bool, str, type(None)) else True


def _shown(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
