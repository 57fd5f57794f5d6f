"""Which part of a training picture is erased, for a model that learns to fill in.

GLIDE (section 2.4) says "random regions" and no more. Here it is, with equal chances, a rectangle, all but a rectangle
(outpainting), or free-hand strokes, as Palette and LaMa mix boxes and brushes.
"""

from __future__ import annotations

import torch
from torch import Tensor

CORNERS = 5
"""Points that a free-hand stroke goes through."""


def random_masks(count: int, side: int, generator: torch.Generator) -> Tensor:
    """bool [count, 1, side, side], True where a picture is erased: some of it always, and in nearly all not all of it.

    A rectangle's sides are between an eighth and the whole of the picture's; a stroke is between a tenth and a third of
    it thick. On the CPU.
    """
    boxes, strokes = _boxes(count, side, generator), _strokes(count, side, generator)
    kind = torch.randint(3, (count, 1, 1, 1), generator=generator)
    inverse = ~boxes
    inverse |= ~inverse.flatten(1).any(1)[:, None, None, None]  # around a box as large as the picture is nothing
    return torch.where(kind == 0, boxes, torch.where(kind == 1, inverse, strokes))


def _boxes(count: int, side: int, generator: torch.Generator) -> Tensor:
    """A rectangle each, anywhere."""
    extent = (side * (0.125 + 0.875 * torch.rand(count, 2, 1, generator=generator))).round().clamp(1, side)
    start = ((side - extent + 1) * torch.rand(count, 2, 1, generator=generator)).floor()
    places = torch.arange(side)
    inside = (places >= start) & (places < start + extent)
    return (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]


def _strokes(count: int, side: int, generator: torch.Generator) -> Tensor:
    """A broken line each: every pixel that lies within half its thickness."""
    corners = side * torch.rand(count, CORNERS, 2, generator=generator)
    radius = side * (0.05 + 0.115 * torch.rand(count, 1, 1, generator=generator))
    places = torch.arange(side) + 0.5
    pixels = torch.stack(torch.meshgrid(places, places, indexing="ij"), 2)
    nearest = torch.full((count, side, side), torch.inf)
    for first, second in zip(corners.unbind(1), corners.unbind(1)[1:], strict=False):
        nearest = torch.minimum(nearest, _distance(pixels, first[:, None, None], second[:, None, None]))
    return (nearest <= radius)[:, None]


def _distance(pixels: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """From pixels [s, s, 2] to the straight line between two points [b, 1, 1, 2]: [b, s, s]."""
    along = second - first
    share = ((pixels - first) * along).sum(3) / along.square().sum(3).clamp(min=1e-9)
    return (pixels - first - share.clamp(0, 1)[..., None] * along).norm(dim=3)
