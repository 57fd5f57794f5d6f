"""A diffusion upsampler: pictures given the same pictures at a lower resolution (section 2.1).

No attention, no caption, no guidance: purely convolutional, so it trains on crops and runs on any side that its levels
can halve.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.errors import Refused
from unclip.schedule import PREDICTIONS, Prediction, Schedule
from unclip.unet import UNet, UNetConfig


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
    scale_shift: bool = True
    """Let the time embedding scale and shift each block's second norm (ADM); False: add it before that norm."""
    time_multiple: int = 4
    """Width of the time embedding, as a multiple of `channels`."""
    antialias: bool = False
    """Enlarge by Keys' cubic with a = −0.5, as Pillow and diffusers' pipelines do; False: a = −0.75 (OpenCV's)."""
    last: bool = False
    """A second network takes the step at timestep 0, the last of every sampling of two steps or more (Karlo's, tuned to
    restore detail in seven steps); both read the same x_t."""

    def __post_init__(self) -> None:
        if self.size <= self.low or self.size % self.low:
            raise Refused(f"upsampler: {self.size} px is no multiple of {self.low} px")
        if self.prediction not in PREDICTIONS:
            raise Refused(f"upsampler: prediction {self.prediction!r} is unknown; use one of {', '.join(PREDICTIONS)}")
        if self.time_multiple < 1:
            raise Refused(f"upsampler: a time embedding of {self.time_multiple} times the channels is impossible")
        _ = self.unet

    @property
    def factor(self) -> int:
        """How many times larger a side becomes."""
        return self.size // self.low

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
        """x [b, 3, h, w] noised in [-1, 1], low [b, 3, h / f, w / f] in [-1, 1] → output [b, 3 or 6, h, w]."""
        inputs = torch.cat([x, self.enlarge(low)], 1)
        if self.last is None:
            return self.unet(inputs, t)
        final = t == 0
        if bool(final.all()):
            return self.last(inputs, t)
        if not bool(final.any()):
            return self.unet(inputs, t)
        return torch.where(final[:, None, None, None], self.last(inputs, t), self.unet(inputs, t))

    def predict(self, output: Tensor, x: Tensor, t: Tensor) -> Prediction:
        """Read the network's output at noised x."""
        return self.schedule.predict(self.config.prediction, output, x, t, learned_range=self.config.learned_range)

    def denoise(self, x: Tensor, t: Tensor, low: Tensor) -> Prediction:
        """The network as samplers and guidance want it."""
        return self.predict(self(x, t, low), x, t)
