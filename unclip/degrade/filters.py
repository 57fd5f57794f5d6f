"""Filtering and resampling in which every picture of a batch has a kernel, a size and a way of its own.

Sums are made of separate multiplications and additions in a fixed order, so that not a bit of a picture depends on what
else is in the batch; a convolution or a matrix product may choose another order for another batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unclip.errors import Refused

LINEAR, CUBIC, AREA = "linear", "cubic", "area"
INTERPOLATIONS = (LINEAR, CUBIC, AREA)


def mirrored(places: np.ndarray, length: int) -> np.ndarray:
    """Where places beyond [0, length) come from, the edges themselves not repeated; any distance, any length ≥ 1."""
    period = max(2 * length - 2, 1)
    places = places % period
    return np.minimum(places, period - places) if length > 1 else places


def gaussian_kernel(covariance: tuple[float, float, float], radius: int) -> Tensor:
    """float32 [2r + 1, 2r + 1] of sum 1 for (variance along y, along x, covariance); nothing beyond 3.5 deviations."""
    yy, xx, yx = covariance
    # A blur of no width is the identity; the floor keeps its inverse finite.
    yy, xx = yy + 1e-6, xx + 1e-6
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float64)
    square = (xx * y**2 - 2 * yx * x * y + yy * x**2) / (xx * yy - yx**2)
    weights = np.where(square <= 3.5**2, np.exp(-0.5 * square), 0.0)
    return torch.from_numpy(weights / weights.sum()).float()


def filtered(x: Tensor, kernels: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """x [b, c, h, w], each correlated with its own kernel [b, k, k], k odd, and mirrored at the edges of its size.

    Raises Refused for kernels without a middle.
    """
    if kernels.ndim != 3 or kernels.shape[1] != kernels.shape[2] or kernels.shape[1] % 2 == 0:
        raise Refused(f"a filter takes odd square kernels [b, k, k], not {[*kernels.shape]}")
    radius = kernels.shape[1] // 2
    height, width = x.shape[2:]
    for dim, length in ((2, height), (3, width)):
        places = np.arange(-radius, length + radius)
        x = _gathered(x, np.stack([mirrored(places, size[dim - 2]) for size in sizes]), dim)
    total = torch.zeros_like(x[:, :, :height, :width])
    used, kernels = (kernels != 0).any(0).tolist(), kernels.to(x)
    for i in range(2 * radius + 1):
        for j in range(2 * radius + 1):
            if used[i][j]:
                total += kernels[:, i, j, None, None, None] * x[:, :, i : i + height, j : j + width]
    return total


def resampled(
    x: Tensor,
    before: Sequence[tuple[int, int]],
    after: Sequence[tuple[int, int]],
    ways: Sequence[str],
) -> Tensor:
    """Pictures of the sizes `before` in the upper left of x [b, c, h, w], brought to the sizes `after` there.

    linear and cubic (a = -3/4) interpolate between the nearest 2 and 4 pixels without a low-pass filter, area averages;
    pixel centres lie at halves, edges are repeated.
    """
    height, width = x.shape[2:]
    if not all(1 <= h <= height and 1 <= w <= width for h, w in [*before, *after]):
        raise Refused(f"pictures of {[*before]} and {[*after]} pixels do not fit into {height}×{width}")
    for dim in (2, 3):
        axis, length = dim - 2, x.shape[dim]
        taps = [_taps(m[axis], n[axis], length, way) for m, n, way in zip(before, after, ways, strict=True)]
        reach = max(index.shape[1] for index, _ in taps)
        index = np.stack([np.pad(index, ((0, 0), (0, reach - index.shape[1])), mode="edge") for index, _ in taps])
        weights = np.stack([np.pad(weight, ((0, 0), (0, reach - weight.shape[1]))) for _, weight in taps])
        shares = torch.from_numpy(weights).to(x)
        shape = [len(x), 1, length, 1] if dim == 2 else [len(x), 1, 1, length]
        total = torch.zeros_like(x)
        for tap in range(reach):
            total += shares[:, :, tap].reshape(shape) * _gathered(x, index[:, :, tap], dim)
        x = total
    return x


def _taps(before: int, after: int, length: int, way: str) -> tuple[np.ndarray, np.ndarray]:
    """(index int64, weight float64), both [length, taps]: which pixels of `before` make each of `after`.

    Places from `after` to `length` repeat the last.
    """
    scale = before / after
    place = np.minimum(np.arange(length), after - 1)
    if way == AREA:
        low, high = place * scale, (place + 1) * scale
        index = np.floor(low + 1e-9).astype(np.int64)[:, None] + np.arange(math.ceil(scale) + 1)
        weight = np.minimum(high[:, None], index + 1) - np.maximum(low[:, None], index)
        weight = weight.clip(0)
    else:
        reach = np.arange(2) if way == LINEAR else np.arange(-1, 3)
        centre = (place + 0.5) * scale - 0.5
        index = np.floor(centre).astype(np.int64)[:, None] + reach
        distance = np.abs(centre[:, None] - index)
        weight = (1 - distance) if way == LINEAR else _cubic(distance)
    return index.clip(0, before - 1), weight / weight.sum(1, keepdims=True)


def _cubic(d: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' cubic convolution at distances below 2."""
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, far)


def extended(x: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Pictures of those sizes with their edges repeated over the rest of x [b, c, h, w]."""
    for dim in (2, 3):
        places = np.arange(x.shape[dim])
        x = _gathered(x, np.stack([np.minimum(places, size[dim - 2] - 1) for size in sizes]), dim)
    return x


def _gathered(x: Tensor, places: np.ndarray, dim: int) -> Tensor:
    """x [b, c, h, w] at places [b, n] along dimension 2 or 3, each sample at its own."""
    shape = list(x.shape)
    shape[dim] = places.shape[1]
    index = torch.from_numpy(places).to(x.device)
    return x.gather(dim, (index[:, None, :, None] if dim == 2 else index[:, None, None, :]).expand(shape))
