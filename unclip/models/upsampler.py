"""A diffusion upsampler: pictures given the same pictures at a lower resolution (section 2.1).

No attention, no caption, no guidance: purely convolutional, so it trains on crops and runs at any size and aspect
ratio (`UnCLIP.sample_upsampler` fills up what the levels cannot halve), in strips where a picture is large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import LATER, SIDE, TIMESTEPS, outside
from unclip.degrade import mirrored
from unclip.diffusion import Prediction, Schedule, check_process
from unclip.errors import Refused
from unclip.models.strips import apply_in_strips
from unclip.models.unet import UNet, UNetConfig

WORKSPACE = 1 << 27
"""Bytes of the widest layer up to which a sampling runs in one piece, and of a layer's strip beyond."""


@dataclass(frozen=True)
class UpsamplerConfig:
    """Shape and process of an upsampler."""

    low: int
    """Side of the input pictures, in pixels."""
    size: int
    """Side of the output pictures, in pixels; a multiple of `low`."""
    channels: int
    """Channels of the first level."""
    multiples: tuple[int, ...]
    """Channels of each level, as multiples of the first."""
    depth: int
    """Residual blocks a level."""
    groups: int = 32
    """Groups of every GroupNorm."""
    dropout: float = 0.0
    """Dropout in residual blocks."""
    unshuffle: int = 1
    """Fold squares of this side into channels at the input, unfold at the output."""
    learned_range: bool = False
    """Output a range of variances beside the mean: six channels."""
    prediction: str = "eps"
    """What the network outputs: x0, eps or v."""
    schedule: str = "cosine"
    """Noise schedule: cosine or linear."""
    timesteps: int = 1000
    """Timesteps of the process."""
    scale_shift: bool = field(default=True, metadata=LATER)
    """Let the time embedding scale and shift each block's second norm (ADM); False: add it before that norm."""
    time_multiple: int = field(default=4, metadata=LATER)
    """Width of the time embedding, as a multiple of `channels`."""
    antialias: bool = field(default=False, metadata=LATER)
    """Enlarge by Keys' cubic with a = −0.5, as Pillow and diffusers' pipelines do; False: a = −0.75 (OpenCV's)."""
    last: bool = field(default=False, metadata=LATER)
    """A second network takes the step at timestep 0, the last of every sampling of two steps or more (Karlo's, tuned to
    restore detail in seven steps); both read the same x_t."""

    def __post_init__(self) -> None:
        if wrong := outside(self, low=SIDE, timesteps=TIMESTEPS):
            raise Refused(f"upsampler: {wrong}")
        if self.size <= self.low or self.size % self.low:
            raise Refused(f"upsampler: {self.size} px is no multiple of {self.low} px")
        check_process("upsampler", self.prediction, self.schedule)
        _ = self.unet

    @property
    def factor(self) -> int:
        """How many times larger a side becomes."""
        return self.size // self.low

    @property
    def grain(self) -> int:
        """What the sides of an input must be multiples of, so that the levels can halve the output."""
        halved = self.unshuffle * 2 ** (len(self.multiples) - 1)
        return halved // math.gcd(halved, self.factor)

    @property
    def crop_grain(self) -> int:
        """What the side of a crop of the output must be a multiple of, so that it begins at pixels of the input."""
        return self.factor * self.unshuffle * 2 ** (len(self.multiples) - 1)

    def check_crop(self, crop: int | None) -> None:
        """Raises Refused for a side that this upsampler cannot be trained on; None is the whole picture."""
        if crop is not None and (crop > self.size or crop % self.crop_grain):
            raise Refused(f"train.crop is {crop}; it must divide by {self.crop_grain} and be at most {self.size}")

    @property
    def unet(self) -> UNetConfig:
        """The U-Net inside."""
        return UNetConfig(
            size=self.size,
            in_channels=6,
            out_channels=6 if self.learned_range else 3,
            channels=self.channels,
            multiples=self.multiples,
            depth=self.depth,
            groups=self.groups,
            dropout=self.dropout,
            unshuffle=self.unshuffle,
            scale_shift=self.scale_shift,
            time_multiple=self.time_multiple,
        )


class Upsampler(nn.Module):
    """p(x | low-resolution x)."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = UNet(config.unet)
        self.last = UNet(config.unet) if config.last else None

    @cached_property
    def schedule(self) -> Schedule:
        """The process this upsampler was made for."""
        return Schedule.named(self.config.schedule, self.config.timesteps)

    def enlarge(self, low: Tensor) -> Tensor:
        """low [b, 3, h / f, w / f] → [b, 3, h, w], bicubic: the condition, the same at every timestep."""
        factor, antialias = float(self.config.factor), self.config.antialias
        return F.interpolate(low, scale_factor=factor, mode="bicubic", align_corners=False, antialias=antialias)

    def forward(self, x: Tensor, t: Tensor, low: Tensor) -> Tensor:
        """x [b, 3, h, w] noised in [-1, 1], low [b, 3, h / f, w / f] in [-1, 1] → output [b, 3 or 6, h, w].

        Raises Refused for sides that do not fit each other or that the levels cannot halve.
        """
        inputs = self._input(x, low)
        if self.last is None:
            return self.unet(inputs, t)
        final = t == 0
        if bool(final.all()):
            return self.last(inputs, t)
        if not bool(final.any()):
            return self.unet(inputs, t)
        return torch.where(final[:, None, None, None], self.last(inputs, t), self.unet(inputs, t))

    def _input(self, x: Tensor, low: Tensor) -> Tensor:
        factor, grain, sides = self.config.factor, self.config.grain, low.shape[2:]
        if any(side % grain for side in sides) or x.shape[2:] != tuple(factor * side for side in sides):
            raise Refused(
                f"upsampler: {[*sides]} px to {[*x.shape[2:]]} px; it takes sides that divide by {grain}, and makes "
                f"them {factor} times as large"
            )
        return torch.cat([x, self.enlarge(low)], 1)

    def predict(self, output: Tensor, x: Tensor, t: Tensor) -> Prediction:
        """Read the network's output at noised x."""
        return self.schedule.predict(self.config.prediction, output, x, t, learned_range=self.config.learned_range)

    def denoise(self, x: Tensor, t: Tensor, low: Tensor) -> Prediction:
        """The network as samplers and guidance want it."""
        return self.predict(self(x, t, low), x, t)

    @torch.no_grad()
    def denoise_in_strips(
        self,
        x: Tensor,
        t: Tensor,
        low: Tensor,
        *,
        workspace: int = WORKSPACE,
        hold: torch.device | str | None = None,
    ) -> Prediction:
        """As `denoise`, picture by picture and each in strips; workspace and hold as in `apply_in_strips`."""
        parts = []
        for one, when in zip(self._input(x, low).split(1), t.split(1), strict=True):
            network = self.unet if self.last is None or int(when) else self.last
            parts.append(apply_in_strips(network, one, when, workspace=workspace, hold=hold))
        return self.predict(torch.cat(parts), x, t)

    def widest(self, pictures: int, height: int, width: int) -> int:
        """Bytes of the widest layer for so many outputs of that size."""
        config, size = self.config, next(self.parameters()).element_size()
        layers = [multiple / 4**level for level, multiple in enumerate(config.multiples)]
        return int(pictures * config.channels * max(layers) * height * width / config.unshuffle**2 * size)


def pad_to_multiple(low: Tensor, grain: int) -> Tensor:
    """low [b, c, h, w] mirrored at its lower and right edge until its sides are multiples of `grain`."""
    for dim in (2, 3):
        side = low.shape[dim]
        if side % grain:
            places = mirrored(np.arange(side + -side % grain), side)
            low = low.index_select(dim, torch.from_numpy(places).to(low.device))
    return low
