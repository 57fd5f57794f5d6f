"""Pictures as tensors: checked, cut, resized, and between 8 bits and [-1, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.errors import Refused


def check_pictures(pictures: Tensor) -> None:
    """Raises Refused unless these are uint8 [n, 3, h, w]."""
    if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.dtype != torch.uint8 or 0 in pictures.shape:
        kind = str(pictures.dtype).removeprefix("torch.")
        raise Refused(f"pictures must be uint8 [n, 3, h, w], RGB, not {kind} {list(pictures.shape)}")


def centre_square(pictures: Tensor) -> Tensor:
    """The centre of pictures [n, c, h, w], as large as their shorter side."""
    height, width = pictures.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pictures[:, :, top : top + side, left : left + side]


def resized(pictures: Tensor, side: int) -> Tensor:
    """Square uint8 pictures [n, 3, s, s] at another side, bicubic and antialiased."""
    if pictures.shape[2] == side:
        return pictures
    x = F.interpolate(pictures.float(), (side, side), mode="bicubic", antialias=True, align_corners=False)
    return x.round().clamp(0, 255).to(torch.uint8)


def to_unit(pictures: Tensor) -> Tensor:
    """uint8 → float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] → uint8, rounded to the nearest."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
