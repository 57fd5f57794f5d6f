"""Corruption of the low-resolution condition, so that an upsampler forgives what a decoder gets wrong (section 2.1).

Blur for 64→256, and the BSR degradation (BSRGAN, Zhang et al. 2021, arXiv 2103.14006, section 3) for 256→1024. Both run
on the pictures' device, a batch at once. A picture's corruption comes from its own seed, drawn on the host, and is
computed with multiplications and additions in a fixed order alone: not a bit of it depends on its neighbours.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.degrade.filters import INTERPOLATIONS, extended, filtered, gaussian_kernel, resampled
from unclip.degrade.jpeg import jpeg
from unclip.errors import Refused


def gaussian_blur(images: Tensor, sigmas: Tensor, kernel: int = 3) -> Tensor:
    """images [b, c, h, w] blurred each by its own sigma [b] ≥ 0 (0 leaves it as it is), borders reflected.

    Raises Refused for a kernel that has no middle or does not fit into the picture.
    """
    b, c, height, width = images.shape
    if kernel < 1 or kernel % 2 == 0 or kernel // 2 >= min(height, width):
        raise Refused(f"a blur's kernel must be odd and less than twice the picture's side, not {kernel}")
    offsets = torch.arange(kernel, device=images.device, dtype=torch.float32) - kernel // 2
    weights = torch.exp(-0.5 * (offsets / sigmas.to(images.device)[:, None].clamp(min=1e-3)).square())
    weights = (weights / weights.sum(1, keepdim=True)).to(images.dtype).repeat_interleave(c, 0)
    padded = F.pad(images, [kernel // 2] * 4, mode="reflect")
    flat = padded.reshape(1, b * c, *padded.shape[2:])
    rows = F.conv2d(flat, weights[:, None, :, None], groups=b * c)
    return F.conv2d(rows, weights[:, None, None, :], groups=b * c).view_as(images)


@dataclass(frozen=True)
class BsrRanges:
    """Ranges of the BSR degradation; every value of a picture is drawn uniformly within them.

    The defaults are the light variant that latent diffusion trained its upscaler with (arXiv 2112.10752), BSR_FULL are
    BSRGAN's own, both at scale factor 1: the condition is low-resolution already, and keeps its size.
    """

    isotropic: float = 0.55
    """Largest σ of the isotropic blur, in pixels; half of the blurs are isotropic."""
    anisotropic: float = 1.25
    """Largest variance along either axis of the anisotropic blur, in pixels²; the axes are turned at random."""
    blurs: int = 1
    """Blurs of a picture, 1 or 2."""
    shrink: float = 2.0
    """Largest factor by which a picture is made smaller, to be brought back to its size some operations later."""
    shrunk: float = 0.8
    """Probability of that."""
    noise: tuple[float, float] = (1.0, 2.0)
    """Least and largest deviation of the Gaussian noise, in levels of 255: 40 % in colour, 40 % grey, and 20 % with
    channels correlated at random."""
    quality: tuple[int, int] = (80, 95)
    """Worst and best JPEG quality; at 100 a picture is not compressed."""
    compressed: float = 0.9
    """Probability of a JPEG compression in between. One more always comes last."""

    def __post_init__(self) -> None:
        for name in ("isotropic", "anisotropic"):
            if not 0 <= getattr(self, name) <= 100:
                raise Refused(f"BSR: {name} is {getattr(self, name)}; it lies between 0 and 100")
        if self.blurs not in (1, 2):
            raise Refused(f"BSR: blurs is {self.blurs}; it is 1 or 2")
        if not 1 <= self.shrink < math.inf:
            raise Refused(f"BSR: shrink is {self.shrink}; it is a finite factor of at least 1")
        for name in ("shrunk", "compressed"):
            if not 0 <= getattr(self, name) <= 1:
                raise Refused(f"BSR: {name} is {getattr(self, name)}; it is a probability between 0 and 1")
        for name, least, most in (("noise", 0, 255), ("quality", 1, 100)):
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise Refused(f"BSR: {name} is {low} to {high}; it must rise within {least} to {most}")

    def scaled(self, strength: float) -> BsrRanges:
        """The same degradation, weaker or stronger: 0 leaves pictures as they are, 1 gives these ranges.

        Deviations and distances from "no change" are multiplied, JPEG qualities bounded below by 1.
        """
        if not 0 <= strength < math.inf:
            raise Refused(f"the strength of a degradation must be a finite number, at least 0, not {strength}")
        low, high = (max(1, round(100 - (100 - quality) * strength)) for quality in self.quality)
        return replace(
            self,
            isotropic=self.isotropic * strength,
            anisotropic=self.anisotropic * strength**2,
            shrink=1 + (self.shrink - 1) * strength,
            noise=(self.noise[0] * strength, self.noise[1] * strength),
            quality=(low, high),
        )


BSR_LIGHT = BsrRanges()
BSR_FULL = BsrRanges(isotropic=2.2, anisotropic=5.0, blurs=2, noise=(2.0, 25.0), quality=(30, 95))

OPERATIONS = ("blur", "blur again", "shrink", "restore", "noise", "compress")


@dataclass(frozen=True)
class Plan:
    """What happens to one picture."""

    order: tuple[str, ...]
    """OPERATIONS as they come, `restore` behind `shrink`."""
    covariances: tuple[tuple[float, float, float], ...]
    """Of each blur: variances along y and x and their covariance, pixels²."""
    shrink: float
    """Factor; 1 leaves the size."""
    interpolations: tuple[str, str]
    """Down and up."""
    mixing: tuple[tuple[float, ...], ...]
    """3×3, from independent noise to the noise of the channels, in levels of 255."""
    qualities: tuple[int, int]
    """Of the JPEG compressions in between and last; 100 is none."""
    seed: int
    """Of the noise."""

    @classmethod
    def drawn(cls, seed: int, ranges: BsrRanges) -> Plan:
        """The plan of a seed: the same uniform numbers whatever the ranges, so that a strength only scales it."""
        digest = hashlib.sha256(f"bsr/{seed}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        uniform = iter(torch.rand(64, generator=generator, dtype=torch.float64).tolist()).__next__
        ranks = {name: uniform() for name in OPERATIONS}
        if ranks["shrink"] > ranks["restore"]:
            ranks["shrink"], ranks["restore"] = ranks["restore"], ranks["shrink"]
        covariances = [_covariance(ranges, *(uniform() for _ in range(5))) for _ in range(2)]
        rescaled, factor = uniform(), 1 + (ranges.shrink - 1) * uniform()
        ways = [INTERPOLATIONS[int(3 * uniform())] for _ in range(2)]
        level = ranges.noise[0] + (ranges.noise[1] - ranges.noise[0]) * uniform()
        mixing = level * _mixing(uniform(), [uniform() for _ in range(12)])
        low, high = ranges.quality
        compressed, between, last = uniform(), *(low + int((high - low + 1) * uniform()) for _ in range(2))
        return cls(
            order=tuple(sorted(OPERATIONS, key=ranks.__getitem__)),
            covariances=tuple(covariances[: ranges.blurs]),
            shrink=factor if rescaled < ranges.shrunk else 1.0,
            interpolations=(ways[0], ways[1]),
            mixing=tuple(tuple(row) for row in mixing.tolist()),
            qualities=(between if compressed < ranges.compressed else 100, last),
            seed=int.from_bytes(digest[8:16], "little", signed=True),
        )

    def smaller(self, height: int, width: int) -> tuple[int, int]:
        """Sides between `shrink` and `restore`."""
        return max(1, round(height / self.shrink)), max(1, round(width / self.shrink))


def bsr_degrade(images: Tensor, seeds: Sequence[int], ranges: BsrRanges = BSR_LIGHT) -> Tensor:
    """images [b, 3, h, w] in [-1, 1], each degraded as its own seed says: the same shape, within [-1, 1].

    Blur, a detour through a smaller size, noise and JPEG come in a random order; a JPEG compression comes last
    (Zhang et al. 2021, section 3.5). A picture smaller than its shape in between lies in the upper left corner.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(seeds) != len(images):
        raise Refused(f"BSR takes pictures [b, 3, h, w] and b seeds, not {[*images.shape]} and {len(seeds)}")
    height, width = images.shape[2:]
    plans = [Plan.drawn(seed, ranges) for seed in seeds]
    radius = math.ceil(3.5 * max(ranges.isotropic, math.sqrt(ranges.anisotropic)))
    sizes = [(height, width)] * len(plans)
    out = images.clone()

    def blurred(x: Tensor, rows: list[int], number: int) -> Tensor:
        if number >= ranges.blurs:
            return x
        kernels = torch.stack([gaussian_kernel(plans[row].covariances[number], radius) for row in rows])
        return filtered(x, kernels, [sizes[row] for row in rows])

    def resized(x: Tensor, rows: list[int], step: int) -> Tensor:
        before = [sizes[row] for row in rows]
        for row in rows:
            sizes[row] = (height, width) if step else plans[row].smaller(height, width)
        after, ways = [sizes[row] for row in rows], [plans[row].interpolations[step] for row in rows]
        return resampled(x, before, after, ways).clamp(-1, 1)

    def noised(x: Tensor, rows: list[int]) -> Tensor:
        fields = [gaussian_noise(plans[row].seed, plans[row].mixing, height, width) for row in rows]
        return (x + torch.stack(fields).to(x)).clamp(-1, 1)

    def compressed(x: Tensor, rows: list[int], last: int) -> Tensor:
        chosen = [n for n, row in enumerate(rows) if plans[row].qualities[last] < 100]
        if chosen:
            part = extended(x[chosen], [sizes[rows[n]] for n in chosen])
            x[chosen] = jpeg(part, [plans[rows[n]].qualities[last] for n in chosen])
        return x

    operations: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
        "blur": lambda x, rows: blurred(x, rows, 0),
        "blur again": lambda x, rows: blurred(x, rows, 1),
        "shrink": lambda x, rows: resized(x, rows, 0),
        "restore": lambda x, rows: resized(x, rows, 1),
        "noise": noised,
        "compress": lambda x, rows: compressed(x, rows, 0),
    }
    for place in range(len(OPERATIONS)):
        for name, operation in operations.items():
            if rows := [row for row, plan in enumerate(plans) if plan.order[place] == name]:
                out[rows] = operation(out[rows], rows)
    return compressed(out, list(range(len(plans))), 1)


def gaussian_noise(seed: int, mixing: Sequence[Sequence[float]], height: int, width: int) -> Tensor:
    """float32 [3, h, w]: independent normal numbers through a 3×3 matrix in levels of 255, for pixels in [-1, 1]."""
    normal = torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))
    channels = []
    for row in mixing:
        shares = [weight * 2 / 255 for weight in row]
        channels.append(shares[0] * normal[0] + shares[1] * normal[1] + shares[2] * normal[2])
    return torch.stack(channels)


def _covariance(
    ranges: BsrRanges, kind: float, first: float, second: float, turn: float, width: float
) -> tuple[float, float, float]:
    """(variance along y, along x, covariance) from five uniform numbers."""
    if kind < 0.5:
        variance = (ranges.isotropic * width) ** 2
        return variance, variance, 0.0
    major, minor, angle = ranges.anisotropic * first, ranges.anisotropic * second, math.pi * turn
    cos, sin = math.cos(angle), math.sin(angle)
    return major * sin**2 + minor * cos**2, major * cos**2 + minor * sin**2, (major - minor) * sin * cos


def _mixing(kind: float, uniform: list[float]) -> np.ndarray:
    """float64 [3, 3] from independent noise to that of the channels, whose largest deviation is at most 1.

    Correlated: the symmetric root of UᵀDU, with U a random orthogonal matrix and D uniform. (BSRGAN takes absolute
    values of UᵀDU, which need not be a covariance.)
    """
    if kind < 0.4:
        return np.eye(3)
    if kind < 0.8:
        return np.eye(3)[[0, 0, 0]]
    turned, _ = np.linalg.qr(np.array(uniform[:9]).reshape(3, 3) - 0.5)
    return turned.T @ np.diag(np.sqrt(uniform[9:])) @ turned
