"""Progress of a generation, for callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Progress(NamedTuple):
    """Where a generation stands; what a callback gets after every step of every model."""

    component: str
    """prior, decoder, upsampler-64, …"""
    tile: int
    """From 0."""
    tiles: int
    step: int
    """From 1 to steps."""
    steps: int
    x0: Tensor
    """The clean sample as the model now predicts it, [tile size, …]; the last tile's padding included."""


Callback = Callable[[Progress], None]

Report = Callable[[str, int, int, Tensor], None]
"""(component, step, steps, predicted x0): what the samplers of a cascade tell."""


class Reporter:
    """Adds to a sampler's report which tile it is about."""

    def __init__(self, callback: Callback | None, tile: int, tiles: int) -> None:
        self.callback, self.tile, self.tiles = callback, tile, tiles

    def __call__(self, component: str, step: int, steps: int, x0: Tensor) -> None:
        if self.callback is not None:
            self.callback(Progress(component, self.tile, self.tiles, step, steps, x0))
