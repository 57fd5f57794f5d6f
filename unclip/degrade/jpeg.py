"""What JPEG does to pictures, for a whole batch on its device: baseline, 4:2:0, as libjpeg does it (ITU-T T.81).

Entropy coding is left out, since it loses nothing. Every sum is made of separate multiplications and additions in a
fixed order: rounding turns the last bit of a coefficient into a visible step, so a picture would otherwise depend on
how many others a matrix product has beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.errors import Refused

LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
) + 4 * ((99,) * 8,)
"""Quantisation steps at quality 50 (T.81, annex K.1): [vertical frequency][horizontal frequency]."""

DCT = [
    [math.sqrt((1 if k == 0 else 2) / 8) * math.cos((2 * n + 1) * k * math.pi / 16) for n in range(8)] for k in range(8)
]
"""The orthonormal DCT-II of eight numbers: [frequency][place]."""


def jpeg(images: Tensor, qualities: Sequence[int]) -> Tensor:
    """images [b, 3, h, w] in [-1, 1], each compressed at its own quality (1 to 100) and decoded again, in [-1, 1].

    Pixels are rounded to 8 bits before and after. Raises Refused for other shapes and qualities.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(qualities) != len(images):
        raise Refused(f"JPEG takes pictures [b, 3, h, w] and b qualities, not {[*images.shape]} and {len(qualities)}")
    if wrong := [quality for quality in qualities if not 1 <= quality <= 100 or quality != int(quality)]:
        raise Refused(f"a JPEG quality is a whole number from 1 to 100, not {wrong[0]}")
    height, width = images.shape[2:]
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5 + 0.5).floor()
    # libjpeg's encoder repeats edges to fill blocks: to the right before it halves the chroma, below after that.
    luma, chroma = _to_ycc(F.pad(pixels, [0, -width % 16, 0, height % 2], mode="replicate"))
    luma = _quantise(_filled(luma), _tables(LUMINANCE, qualities, images.device))
    chroma = _quantise(_filled(_halve(chroma)), _tables(CHROMINANCE, qualities, images.device))
    chroma = _double(chroma[:, :, : (height + 1) // 2, : (width + 1) // 2])
    decoded = _to_rgb(luma[:, :, :height, :width], chroma[:, :, :height, :width])
    return (decoded / 127.5 - 1).to(images.dtype)


def quantisation(base: Sequence[Sequence[int]], quality: int) -> list[list[int]]:
    """The quantisation steps at a quality from 1 to 100, by libjpeg's rule."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return [[min(max((step * scale + 50) // 100, 1), 255) for step in row] for row in base]


def _tables(base: Sequence[Sequence[int]], qualities: Sequence[int], device: torch.device) -> Tensor:
    """[b, 1, 1, 8, 1, 8]: steps that broadcast over blocks."""
    steps = torch.tensor([quantisation(base, int(quality)) for quality in qualities], dtype=torch.float32)
    return steps.to(device).view(-1, 1, 1, 8, 1, 8)


def _filled(planes: Tensor) -> Tensor:
    """The last row repeated to whole blocks."""
    return F.pad(planes, [0, 0, 0, -planes.shape[2] % 8], mode="replicate")


def _quantise(planes: Tensor, steps: Tensor) -> Tensor:
    """planes [b, p, h, w] of 0 to 255 with their DCT coefficients rounded to multiples of `steps`."""
    b, p, height, width = planes.shape
    blocks = (planes - 128).view(b, p, height // 8, 8, width // 8, 8)
    forward = torch.tensor(DCT, dtype=torch.float32, device=planes.device)
    coefficients = _transform(_transform(blocks, forward, 5), forward, 3)
    # Whole pixels often make exact ties; they go away from zero, as in integer arithmetic, whatever float32 loses.
    rounded = ((coefficients / steps).abs() + 0.5001).floor().copysign(coefficients) * steps
    blocks = _transform(_transform(rounded, forward.T, 3), forward.T, 5)
    return (blocks.reshape(b, p, height, width) + 128.5).floor().clamp(0, 255)


def _transform(blocks: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """The matrix [8, 8] times every vector along `dim`, summed in the order of its columns."""
    shape = [1] * blocks.ndim
    shape[dim] = 8
    total = torch.zeros_like(blocks)
    for n in range(8):
        total += matrix[:, n].view(shape) * blocks.narrow(dim, n, 1)
    return total


def _to_ycc(rgb: Tensor) -> tuple[Tensor, Tensor]:
    """0 to 255 [b, 3, h, w] → (Y [b, 1, h, w], Cb and Cr [b, 2, h, w]), rounded (JFIF)."""
    red, green, blue = rgb.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma_blue = -0.168735892 * red - 0.331264108 * green + 0.5 * blue + 128
    chroma_red = 0.5 * red - 0.418687589 * green - 0.081312411 * blue + 128
    return (luma + 0.5).floor()[:, None], (torch.stack([chroma_blue, chroma_red], 1) + 0.5).floor()


def _to_rgb(luma: Tensor, chroma: Tensor) -> Tensor:
    """The way back: 0 to 255, rounded."""
    y, (blue, red) = luma[:, 0], (chroma - 128).unbind(1)
    rgb = torch.stack([y + 1.402 * red, y - 0.344136286 * blue - 0.714136286 * red, y + 1.772 * blue], 1)
    return (rgb + 0.5).floor().clamp(0, 255)


def _halve(planes: Tensor) -> Tensor:
    """Means of 2×2 pixels, rounded down and up from column to column, as libjpeg does so that no level drifts."""
    rows = planes[:, :, 0::2] + planes[:, :, 1::2]
    sums = rows[..., 0::2] + rows[..., 1::2]
    bias = 1 + torch.arange(sums.shape[-1], device=sums.device) % 2
    return ((sums + bias) / 4).floor()


def _double(planes: Tensor) -> Tensor:
    """Twice the side, each pixel 3 : 1 between its nearest neighbours (libjpeg's "fancy" upsampling)."""
    padded = F.pad(planes, [1, 1, 1, 1], mode="replicate")
    rows = _between(padded, 2)
    columns = _between(rows, 3)
    bias = 8 - torch.arange(columns.shape[-1], device=planes.device) % 2
    return ((columns + bias) / 16).floor()


def _between(padded: Tensor, dim: int) -> Tensor:
    """3·near + far along a dimension of n + 2 → 2n."""
    length = padded.shape[dim] - 2
    near, before, after = (padded.narrow(dim, start, length) for start in (1, 0, 2))
    return torch.stack([3 * near + before, 3 * near + after], dim + 1).flatten(dim, dim + 1)
