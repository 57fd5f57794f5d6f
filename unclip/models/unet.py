"""The ADM U-Net (Dhariwal & Nichol 2021), with attention to context tokens where asked, or none at all.

`unshuffle` > 1 folds pixels into channels before the first convolution and unfolds them after the last; `position`
adds a learned map to every level. Both help small, short trainings, and both leave what diffusers can hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.config import DEPTH, SHARE, SIDE, WIDTH, Range, outside
from unclip.errors import Refused
from unclip.models.layers import ContextAttention, Conv2d, ResBlock, TimeEmbedding, zeroed


@dataclass(frozen=True)
class UNetConfig:
    """Shape of one U-Net; see DecoderConfig and UpsamplerConfig for what each number means."""

    size: int
    in_channels: int
    out_channels: int
    channels: int
    multiples: tuple[int, ...]
    depth: int
    attention: tuple[int, ...] = ()
    head_channels: int = 64
    context_width: int = 0
    groups: int = 32
    dropout: float = 0.0
    unshuffle: int = 1
    position: bool = False
    scale_shift: bool = True
    time_multiple: int = 4
    beside: int = 0

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("channels", "multiples", "head_channels", "groups", "unshuffle", "time_multiple"), WIDTH)
        sizes["depth"] = DEPTH
        if wrong := outside(
            self, size=SIDE, attention=SIDE, context_width=Range(0, WIDTH.most), dropout=SHARE, **sizes
        ):
            raise Refused(f"a U-Net's {wrong}")
        if not 1 <= len(self.multiples) <= 16:
            raise Refused(f"a U-Net's multiples are {list(self.multiples)}; give one number a level, 1 to 16 of them")
        side = self.size // self.unshuffle
        if side * self.unshuffle != self.size or side % 2 ** (len(self.multiples) - 1):
            raise Refused(
                f"a U-Net of {len(self.multiples)} levels cannot halve pictures of {self.size} px (unshuffled by "
                f"{self.unshuffle}) that often; use fewer multiples or another size"
            )
        if self.channels % self.groups or self.channels % 2:
            raise Refused(f"{self.channels} channels must be even and divide into {self.groups} norm groups")
        sides = [side >> level for level in range(len(self.multiples))]
        for attended in self.attention:
            if attended not in sides:
                raise Refused(f"attention at {attended} px: this U-Net has levels of {sides} px only")
        for multiple, at in zip(self.multiples, sides, strict=True):
            if at in self.attention and self.channels * multiple % self.head_channels:
                raise Refused(f"{self.channels * multiple} channels do not divide into heads of {self.head_channels}")

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        return self.time_multiple * self.channels


class Stage(nn.Module):
    """Residual blocks of one level, each followed by attention where the level has it, then a resampling block."""

    def __init__(self, config: UNetConfig, inputs: list[int], out: int, side: int, resample: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_block(config, channels, out) for channels in inputs])
        self.attentions = nn.ModuleList([_attention(config, out) for _ in inputs] if side in config.attention else [])
        self.resample = _block(config, out, out, resample) if resample else None


class UNet(nn.Module):
    """x [b, in, h, w], time addend [b, time_width] or None, context → [b, out, h, w]."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        fold = config.unshuffle**2
        widths = [config.channels * multiple for multiple in config.multiples]
        side = config.size // config.unshuffle
        sides = [side >> level for level in range(len(widths))]
        last = len(widths) - 1
        self.time = TimeEmbedding(config.channels, config.time_width)
        self.conv_in = Conv2d(config.in_channels * fold, config.channels, 3, padding=1)
        # As more channels of conv_in would do, but under a name of its own: weights without it still fit.
        self.conv_in_beside = (
            zeroed(Conv2d(config.beside * fold, config.channels, 3, padding=1, bias=False)) if config.beside else None
        )

        skips = [config.channels]
        current = config.channels
        down = []
        for level, width in enumerate(widths):
            inputs = [current] + [width] * (config.depth - 1)
            down.append(Stage(config, inputs, width, sides[level], "down" if level < last else ""))
            skips += [width] * (config.depth + (level < last))
            current = width
        self.down = nn.ModuleList(down)
        self.mid_1 = _block(config, current, current)
        self.mid_attention = _attention(config, current) if sides[-1] in config.attention else None
        self.mid_2 = _block(config, current, current)
        up = []
        for level in reversed(range(len(widths))):
            inputs = []
            for _ in range(config.depth + 1):
                inputs.append(current + skips.pop())
                current = widths[level]
            up.append(Stage(config, inputs, current, sides[level], "up" if level else ""))
        self.up = nn.ModuleList(up)
        self.norm_out = nn.GroupNorm(config.groups, current)
        self.conv_out = zeroed(Conv2d(current, config.out_channels * fold, 3, padding=1))
        self.positions = nn.ParameterList(
            [torch.zeros(1, width, s, s) for width, s in zip([config.channels, *widths[:-1]], sides, strict=True)]
            if config.position
            else []
        )

    def _attended(self) -> list[ContextAttention]:
        """Every attention, in the order of the forward pass."""
        found: list[ContextAttention] = [a for stage in self.down for a in stage.attentions]  # type: ignore[union-attr]
        if self.mid_attention is not None:
            found.append(self.mid_attention)
        return found + [a for stage in self.up for a in stage.attentions]  # type: ignore[union-attr]

    def encode(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of context tokens [b, n, w] for every attention, made once for all timesteps."""
        return tuple(attention.encode(tokens) for attention in self._attended())

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        addend: Tensor | None = None,
        context: tuple[Tensor, ...] = (),
        mask: Tensor | None = None,
        beside: Tensor | None = None,
    ) -> Tensor:
        """addend joins the time embedding; context from `encode`; mask [b, n] True where a context token is seen.

        beside [b, c, h, w]: further channels of the input; None is zeros.
        """
        time = self.time(t)
        time = F.silu(time if addend is None else time + addend)
        remaining = iter(context)
        h = self.conv_in(F.pixel_unshuffle(x, self.config.unshuffle))
        if self.conv_in_beside is not None and beside is not None:
            h = h + self.conv_in_beside(F.pixel_unshuffle(beside, self.config.unshuffle))
        skips = [h]
        for level, stage in enumerate(self.down):
            if self.config.position:
                h = h + self.positions[level]
            for i, block in enumerate(stage.blocks):  # type: ignore[arg-type]
                h = block(h, time)
                if len(stage.attentions):  # type: ignore[arg-type]
                    h = stage.attentions[i](h, next(remaining), mask)  # type: ignore[index, operator]
                skips.append(h)
            if stage.resample is not None:
                h = stage.resample(h, time)  # type: ignore[operator]
                skips.append(h)
        h = self.mid_1(h, time)
        if self.mid_attention is not None:
            h = self.mid_attention(h, next(remaining), mask)
        h = self.mid_2(h, time)
        for stage in self.up:
            for i, block in enumerate(stage.blocks):  # type: ignore[arg-type]
                h = block(torch.cat([h, skips.pop()], 1), time)
                if len(stage.attentions):  # type: ignore[arg-type]
                    h = stage.attentions[i](h, next(remaining), mask)  # type: ignore[index, operator]
            if stage.resample is not None:
                h = stage.resample(h, time)  # type: ignore[operator]
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.config.unshuffle)


def _block(config: UNetConfig, channels: int, out: int, resample: str = "") -> ResBlock:
    return ResBlock(
        channels,
        out,
        config.time_width,
        groups=config.groups,
        dropout=config.dropout,
        resample=resample,
        scale_shift=config.scale_shift,
    )


def _attention(config: UNetConfig, channels: int) -> ContextAttention:
    return ContextAttention(channels, config.context_width, config.head_channels, config.groups)
