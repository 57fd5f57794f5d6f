"""The encoder half of the ADM U-Net with attention pooling (Dhariwal & Nichol 2021, section 4): a vector of a noised
picture.

What guides a decoder reads x_t at any t, which a network of clean pictures cannot: a classifier and a noised CLIP are
both this encoder, with another number of outputs. They belong to one decoder, whose size and noise they were made for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import TIMESTEPS, WIDTH, outside
from unclip.diffusion import check_process
from unclip.errors import Refused
from unclip.models.layers import Conv2d, ResBlock, TimeEmbedding, attend, zeroed
from unclip.models.unet import UNetConfig


@dataclass(frozen=True)
class HalfUNetConfig:
    """Shape of the encoder, and the process whose pictures it reads."""

    size: int
    """Side of the pictures, in pixels: the decoder's."""
    channels: int
    """Channels of the first level."""
    multiples: tuple[int, ...]
    """Channels of each level, as multiples of the first."""
    depth: int
    """Residual blocks a level."""
    attention: tuple[int, ...]
    """Sides, in (unshuffled) pixels, of the levels that attend; the middle and the pooling always do."""
    head_channels: int = 64
    """Channels of an attention head."""
    groups: int = 32
    """Groups of every GroupNorm."""
    dropout: float = 0.0
    """Dropout in residual blocks."""
    unshuffle: int = 1
    """Fold squares of this side into channels at the input."""
    schedule: str = "cosine"
    """Noise schedule, cosine or linear: the decoder's."""
    timesteps: int = 1000
    """Timesteps of the process: the decoder's."""

    def __post_init__(self) -> None:
        if wrong := outside(self, channels=WIDTH, multiples=WIDTH, head_channels=WIDTH, timesteps=TIMESTEPS):
            raise Refused(f"encoder: {wrong}")
        if not self.multiples or self.channels * self.multiples[-1] % self.head_channels:
            raise Refused(
                f"encoder: the channels of the last level ({self.channels} times the last of {self.multiples}) are "
                f"pooled, and do not divide into heads of {self.head_channels}"
            )
        check_process("encoder", "x0", self.schedule)
        # The other half's rules are this half's: sides that halve, channels that divide into groups and heads.
        UNetConfig(
            size=self.size,
            in_channels=3,
            out_channels=3,
            channels=self.channels,
            multiples=self.multiples,
            depth=self.depth,
            attention=self.attention,
            head_channels=self.head_channels,
            groups=self.groups,
            dropout=self.dropout,
            unshuffle=self.unshuffle,
        )

    @property
    def sides(self) -> list[int]:
        """Side of each level, in unshuffled pixels."""
        return [self.size // self.unshuffle >> level for level in range(len(self.multiples))]


class SelfAttention(nn.Module):
    """Attention of every pixel to every pixel (ADM's attention block)."""

    def __init__(self, channels: int, head_channels: int, groups: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x [b, c, h, w]."""
        b, c, height, width = x.shape
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(pixels).view(b, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = attend(q, k, v).transpose(1, 2).reshape(b, height * width, c)
        return x + self.out(attended).transpose(1, 2).reshape(b, c, height, width)


class AttentionPool(nn.Module):
    """[b, c, s, s] → [b, out]: the mean of all pixels asks them all (Radford et al. 2021, section 2.4, as in ADM)."""

    def __init__(self, side: int, channels: int, head_channels: int, out: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.positions = nn.Parameter(torch.randn(side**2 + 1, channels) / channels**0.5)
        self.query = nn.Linear(channels, channels)
        self.keys_values = nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        pixels = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([pixels.mean(1, keepdim=True), pixels], 1) + self.positions
        q = self.query(tokens[:, :1]).view(b, 1, self.heads, -1).transpose(1, 2)
        k, v = self.keys_values(tokens).view(b, tokens.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v).reshape(b, c))


class Level(nn.Module):
    """Residual blocks, each followed by attention where the level has it, and a block that halves the side."""

    def __init__(self, config: HalfUNetConfig, channels: int, out: int, side: int, *, halve: bool) -> None:
        super().__init__()
        inputs = [channels] + [out] * (config.depth - 1)
        attends = side in config.attention
        self.blocks = nn.ModuleList([_block(config, width, out) for width in inputs])
        self.attentions = nn.ModuleList([_attention(config, out) if attends else nn.Identity() for _ in inputs])
        self.halve = _block(config, out, out, "down") if halve else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x, time))
        return x if self.halve is None else self.halve(x, time)


class HalfUNet(nn.Module):
    """Noised pictures x [b, 3, size, size] in the process's scale, t [b] → [b, out]."""

    def __init__(self, config: HalfUNetConfig, out: int) -> None:
        super().__init__()
        self.unshuffle = config.unshuffle
        widths = [config.channels * multiple for multiple in config.multiples]
        self.time = TimeEmbedding(config.channels, _time_width(config))
        self.conv_in = Conv2d(3 * config.unshuffle**2, config.channels, 3, padding=1)
        inputs = [config.channels, *widths]
        self.levels = nn.ModuleList(
            [
                Level(config, channels, width, side, halve=side > config.sides[-1])
                for channels, width, side in zip(inputs, widths, config.sides, strict=False)
            ]
        )
        self.mid_1 = _block(config, widths[-1], widths[-1])
        self.mid_attention = _attention(config, widths[-1])
        self.mid_2 = _block(config, widths[-1], widths[-1])
        self.norm = nn.GroupNorm(config.groups, widths[-1])
        self.pool = AttentionPool(config.sides[-1], widths[-1], config.head_channels, out)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = F.silu(self.time(t))
        h = self.conv_in(F.pixel_unshuffle(x, self.unshuffle))
        for level in self.levels:
            h = level(h, time)
        h = self.mid_2(self.mid_attention(self.mid_1(h, time)), time)
        return self.pool(F.silu(self.norm(h)))


def _time_width(config: HalfUNetConfig) -> int:
    return 4 * config.channels


def _block(config: HalfUNetConfig, channels: int, out: int, resample: str = "") -> ResBlock:
    return ResBlock(channels, out, _time_width(config), groups=config.groups, dropout=config.dropout, resample=resample)


def _attention(config: HalfUNetConfig, channels: int) -> SelfAttention:
    return SelfAttention(channels, config.head_channels, config.groups)
