"""A convolutional U-Net evaluated in strips of rows: what the network itself gives, in a fraction of the memory.

Tiles that run through the whole network would be wrong, since a GroupNorm looks at the whole picture. So it goes layer
by layer: a convolution reads one row more on either side of a strip, and the mean and variance of each channel are
gathered from the strips of a layer as they are made, and combined exactly before the next layer reads them. Nothing is
computed twice but those rows and the first convolution.

What lies in memory as a whole is then one tensor for each skip connection, one for the layer that is read and one for
the layer that is written (the second convolution of a block writes over the first one's output). Normalised, activated,
padded and concatenated copies, and whatever a convolution makes to work in, exist for a strip at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.errors import Refused
from unclip.models.layers import ResBlock
from unclip.models.unet import UNet

Read = Callable[[int, int], Tensor]
"""(first row, row behind the last) → those rows, [b, c, rows, w]."""

LEAST = 8
"""Rows of a strip at least: below, the rows on either side would cost more than they save."""


class Layer(NamedTuple):
    """An activation that is read in strips; mean and variance over the pixels of each channel, float32 [b, c]."""

    read: Read
    channels: int
    height: int
    width: int
    mean: Tensor
    variance: Tensor

    def joined(self, other: Layer) -> Layer:
        """Both along the channels, without making that tensor."""

        def read(low: int, high: int) -> Tensor:
            return torch.cat([self.read(low, high), other.read(low, high)], 1)

        statistics = torch.cat([self.mean, other.mean], 1), torch.cat([self.variance, other.variance], 1)
        return Layer(read, self.channels + other.channels, self.height, self.width, *statistics)


def apply_in_strips(
    unet: UNet, x: Tensor, t: Tensor, *, workspace: int, hold: torch.device | str | None = None
) -> Tensor:
    """unet(x, t) for x [b, in, h, w], equal up to the rounding of sums; no gradients.

    workspace: bytes that a layer's strip may take; a handful of them exist at once. hold: where whole layers lie,
    default beside x; "cpu" leaves an accelerator nothing but weights and strips. Raises Refused for a U-Net with
    attention or position maps, which look at the whole picture.
    """
    if unet.config.attention or unet.config.position:
        raise Refused("a U-Net with attention or position maps cannot be evaluated in strips")
    if workspace < 1:
        raise Refused(f"a workspace has at least 1 byte, not {workspace}")
    with torch.no_grad():
        return _Walk(unet, x, t, workspace, x.device if hold is None else torch.device(hold)).run()


class _Held:
    """A whole activation that may be replaced from the top down while it is still read."""

    def __init__(self, shape: tuple[int, ...], like: Tensor, hold: torch.device) -> None:
        self.data = torch.empty(shape, dtype=like.dtype, device=hold)
        self.device = like.device
        self._done = 0
        self._above: Tensor | None = None

    def read(self, low: int, high: int) -> Tensor:
        rows = self.data[:, :, low:high]
        if self._above is not None and low < self._done:
            rows = torch.cat([self._above, rows[:, :, self._done - low :]], 2)
        return rows.to(self.device)

    def write(self, low: int, high: int, rows: Tensor) -> None:
        self.data[:, :, low:high] = rows

    def replace(self, low: int, high: int, rows: Tensor) -> None:
        """As `write`, but the next strip still reads the old row above it."""
        self._above, self._done = self.data[:, :, high - 1 : high].clone(), high
        self.write(low, high, rows)
        if high == self.data.shape[2]:
            self._above = None


class _Walk:
    """One evaluation."""

    def __init__(self, unet: UNet, x: Tensor, t: Tensor, workspace: int, hold: torch.device) -> None:
        self.unet, self.x, self.workspace, self.hold = unet, x, workspace, hold
        self.time = F.silu(unet.time(t))

    def run(self) -> Tensor:
        h = self._first()
        skips = [h]
        for stage in self.unet.down:
            for block in stage.blocks:  # type: ignore[union-attr]
                h = self._block(block, h)
                skips.append(h)
            if stage.resample is not None:
                h = self._block(stage.resample, h)  # type: ignore[arg-type]
                skips.append(h)
        h = self._block(self.unet.mid_2, self._block(self.unet.mid_1, h))
        for stage in self.unet.up:
            for block in stage.blocks:  # type: ignore[union-attr]
                h = self._block(block, h.joined(skips.pop()))
            if stage.resample is not None:
                h = self._block(stage.resample, h)  # type: ignore[arg-type]
        return self._last(h)

    def _first(self) -> Layer:
        """The first convolution; cheap beside the others, so it is made anew wherever it is read."""
        fold = self.unet.config.unshuffle
        height, width = (side // fold for side in self.x.shape[2:])

        def pixels(low: int, high: int) -> Tensor:
            return F.pixel_unshuffle(self.x[:, :, low * fold : high * fold], fold)

        def read(low: int, high: int) -> Tensor:
            return _convolved(self.unet.conv_in, pixels, height, low, high)

        channels = self.unet.config.channels
        parts = [_moments(read(low, high)) for low, high in self._strips(channels, height, width)]
        return Layer(read, channels, height, width, *_combined(parts))

    def _block(self, block: ResBlock, source: Layer) -> Layer:
        """unclip.models.layers.ResBlock."""
        height, width = (_resized(block.resample, side) for side in (source.height, source.width))
        scale, shift = _affine(block.norm_1, source)
        read = _resampled(_activated(source.read, scale, shift), block.resample)
        channels = block.conv_1.out_channels
        held = _Held((len(self.x), channels, height, width), self.x, self.hold)
        strips = list(self._strips(max(source.channels, channels), height, width))
        modulation = block.time(self.time)[:, :, None, None]

        parts = []
        for low, high in strips:
            rows = _convolved(block.conv_1, read, height, low, high)
            if not block.scale_shift:
                rows += modulation
            parts.append(_moments(rows))
            held.write(low, high, rows)
        middle = Layer(held.read, channels, height, width, *_combined(parts))

        scale, shift = _affine(block.norm_2, middle)
        if block.scale_shift:
            more_scale, more_shift = modulation.chunk(2, dim=1)
            scale, shift = scale * (1 + more_scale), shift * (1 + more_scale) + more_shift
        read = _activated(middle.read, scale, shift)
        past = _resampled(source.read, block.resample)
        parts = []
        for low, high in strips:
            rows = _convolved(block.conv_2, read, height, low, high)
            rows += block.skip(past(low, high))
            parts.append(_moments(rows))
            held.replace(low, high, rows)
        return Layer(held.read, channels, height, width, *_combined(parts))

    def _last(self, source: Layer) -> Tensor:
        """The output's norm and convolution."""
        unet, fold = self.unet, self.unet.config.unshuffle
        read = _activated(source.read, *_affine(unet.norm_out, source))
        out = self.x.new_empty(len(self.x), unet.config.out_channels, *self.x.shape[2:])
        for low, high in self._strips(source.channels, source.height, source.width):
            rows = _convolved(unet.conv_out, read, source.height, low, high)
            out[:, :, low * fold : high * fold] = F.pixel_shuffle(rows, fold)
        return out

    def _strips(self, channels: int, height: int, width: int) -> Iterator[tuple[int, int]]:
        row = len(self.x) * channels * width * self.x.element_size()
        rows = max(self.workspace // row, LEAST)
        for low in range(0, height, rows):
            yield low, min(low + rows, height)


def _convolved(conv: nn.Module, read: Read, height: int, low: int, high: int) -> Tensor:
    """Rows of a 3×3 convolution; at the picture's edges its own padding is the right one."""
    first, last = max(low - 1, 0), min(high + 1, height)
    return conv(read(first, last))[:, :, low - first : high - first]


def _activated(read: Read, scale: Tensor, shift: Tensor) -> Read:
    """SiLU(scale·x + shift), in float32 as GroupNorm computes, in the type of x."""

    def activated(low: int, high: int) -> Tensor:
        rows = read(low, high)
        return F.silu(torch.addcmul(shift, rows.float(), scale).to(rows.dtype), inplace=True)

    return activated


def _resized(resample: str, side: int) -> int:
    return {"down": side // 2, "up": 2 * side, "": side}[resample]


def _resampled(read: Read, resample: str) -> Read:
    """Rows after halving (mean) or doubling (nearest), as a block does it inside."""

    def halved(low: int, high: int) -> Tensor:
        return F.avg_pool2d(read(2 * low, 2 * high), 2)

    def doubled(low: int, high: int) -> Tensor:
        first = low // 2
        rows = F.interpolate(read(first, -(-high // 2)), scale_factor=2.0, mode="nearest")
        return rows[:, :, low - 2 * first : high - 2 * first]

    return {"down": halved, "up": doubled, "": read}[resample]


def _moments(rows: Tensor) -> tuple[int, Tensor, Tensor]:
    """(pixels, mean [b, c], variance [b, c]) of a strip."""
    variance, mean = torch.var_mean(rows.float(), (2, 3), correction=0)
    return rows.shape[2] * rows.shape[3], mean, variance


def _combined(parts: list[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and variance of all, from those of parts: the variance within them plus that between their means."""
    pixels = [part[0] for part in parts]
    means, variances = torch.stack([part[1] for part in parts]), torch.stack([part[2] for part in parts])
    share = torch.tensor(pixels, dtype=torch.float32, device=means.device)[:, None, None] / sum(pixels)
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)


def _affine(norm: nn.GroupNorm, layer: Layer) -> tuple[Tensor, Tensor]:
    """GroupNorm of a layer as scale and shift of its channels, both float32 [b, c, 1, 1]."""
    b, c = layer.mean.shape
    grouped = (b, norm.num_groups, c // norm.num_groups)
    means, variances = layer.mean.view(grouped), layer.variance.view(grouped)
    mean = means.mean(2, keepdim=True)
    variance = (variances + (means - mean).square()).mean(2, keepdim=True)
    scale = norm.weight.float() * (variance + norm.eps).rsqrt().expand(grouped).reshape(b, c)
    shift = norm.bias.float() - mean.expand(grouped).reshape(b, c) * scale
    return scale[:, :, None, None], shift[:, :, None, None]
