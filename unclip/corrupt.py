"""Corruption of the low-resolution condition, so that an upsampler forgives what a decoder gets wrong (section 2.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def blur_sigmas(seeds: Sequence[int], high: float = 0.6) -> Tensor:
    """A blur for each sample, uniform in [0, high], from that sample's own seed; float32 [b]."""
    draws = [int.from_bytes(hashlib.sha256(f"blur/{seed}".encode()).digest()[:8], "little") for seed in seeds]
    return torch.tensor([draw / 2**64 * high for draw in draws], dtype=torch.float32)


def gaussian_blur(images: Tensor, sigmas: Tensor, kernel: int = 3) -> Tensor:
    """images [b, c, h, w] blurred each by its own sigma [b] (0 leaves it as it is), borders reflected."""
    b, c, _, _ = images.shape
    offsets = torch.arange(kernel, device=images.device, dtype=torch.float32) - kernel // 2
    weights = torch.exp(-0.5 * (offsets / sigmas.to(images.device)[:, None].clamp(min=1e-3)).square())
    weights = (weights / weights.sum(1, keepdim=True)).to(images.dtype).repeat_interleave(c, 0)
    padded = F.pad(images, [kernel // 2] * 4, mode="reflect")
    flat = padded.reshape(1, b * c, *padded.shape[2:])
    rows = F.conv2d(flat, weights[:, None, :, None], groups=b * c)
    return F.conv2d(rows, weights[:, None, None, :], groups=b * c).view_as(images)
