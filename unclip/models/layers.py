"""Layers that the transformers and the U-Nets share.

With the defaults each has the structure that diffusers' counterpart has, so that weights can be mapped one to one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoidal features [b, width] of t [b], cosines first (Vaswani et al. 2017, with base 10,000)."""
    half = width // 2
    frequency = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angle = t.float()[:, None] * frequency
    return F.pad(torch.cat([angle.cos(), angle.sin()], 1), (0, width % 2))


class TimeEmbedding(nn.Module):
    """t [b] → [b, out]: sinusoidal features of `width` through two linear layers."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_embedding(t, self.width).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(features)))


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all parameters 0, so that its residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Conv2d(nn.Conv2d):
    """A convolution that may multiply in bfloat16, between float32 activations and with float32 weights.

    On CPUs with bfloat16 units a 3×3 convolution of 64 channels takes 0.4 of the time so, while whole-model autocast
    loses it again in attention and GroupNorm (see docs/demo.md). Off unless `bfloat16_convolutions` turned it on.
    """

    in_bfloat16 = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_bfloat16:
            return super().forward(x)
        layout = torch.channels_last
        x = x.to(torch.bfloat16, memory_format=layout)
        weight = self.weight.to(torch.bfloat16, memory_format=layout)
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        return F.conv2d(x, weight, bias, self.stride, self.padding).float()


def bfloat16_convolutions(model: nn.Module, least: int = 32) -> None:
    """Lets the model's convolutions of at least `least` input channels multiply in bfloat16."""
    for module in model.modules():
        if isinstance(module, Conv2d):
            module.in_bfloat16 = module.in_channels >= least


class UpConv2d(Conv2d):
    """A 3×3 convolution (padding 1) of a picture whose sides `doubled` doubles first, by nearest neighbours.

    Folded, it never makes the larger picture: each output pixel sees 2×2 different ones at most, so the two are one
    transposed convolution of 4×4 taps at stride 2, with 4/9 of the multiplications and the same result up to the
    rounding of sums. Off unless `fold_upsampling` turned it on.
    """

    folded = False
    FROM = 32 * 32
    """Pixels of the smaller picture from which folding the weights costs less than it saves (measured on CPUs)."""

    def doubled(self, x: Tensor) -> Tensor:
        """self(x doubled): x [b, c, h, w] → [b, out, 2h, 2w]."""
        pays = x.device.type == "cpu" and x.shape[2] * x.shape[3] >= self.FROM
        if not self.folded or self.in_bfloat16 or not pays:
            return self(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        turned = self.weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        # The sum over each 2×2 window: what one small pixel gives, seen through the up to 2×2 taps that fall on it.
        taps = F.avg_pool2d(turned, 2, stride=1, padding=1, divisor_override=1)
        return F.conv_transpose2d(x, taps, self.bias, stride=2, padding=1)


def fold_upsampling(model: nn.Module) -> None:
    """Lets the model's blocks that double their side do so inside their first convolution (see `UpConv2d`)."""
    for module in model.modules():
        if isinstance(module, UpConv2d):
            module.folded = True


class KeyValues:
    """What a causal block keeps of the tokens it has read, so that the next one costs one token: room for `room`.

    It is written in place, so that it serves sampling and not training.
    """

    def __init__(self, room: int) -> None:
        self.room, self.read = room, 0
        self._stored: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Takes in those of the next n tokens, [b, heads, n, c] each; returns those of all tokens so far."""
        if self._stored is None:
            b, heads, _, c = keys.shape
            self._stored = keys.new_empty(2, b, heads, self.room, c)
        start, self.read = self.read, self.read + keys.shape[2]
        self._stored[0, :, :, start : self.read] = keys
        self._stored[1, :, :, start : self.read] = values
        return self._stored[0, :, :, : self.read], self._stored[1, :, :, : self.read]

    def remembered(self) -> Tensor:
        """All that was read, [b, 2, heads, n, c]; see `PrefixKeyValues`."""
        if self._stored is None:
            raise ValueError("nothing was read yet")
        return self._stored[:, :, :, : self.read].transpose(0, 1)


class PrefixKeyValues:
    """Keys and values of a beginning that was read once, [b, 2, heads, n, c]: every call goes on from there anew."""

    def __init__(self, keys_values: Tensor) -> None:
        self._keys, self._values = keys_values.unbind(1)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the beginning and of the tokens after it; remembers nothing of the latter."""
        return torch.cat([self._keys, keys], 2), torch.cat([self._values, values], 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ / √c)·v: q [b, heads, n, c], k and v [b, heads, m, c]; mask, broadcast to [b, heads, n, m], True
    where a query may look at a key.

    Where a gradient is wanted on a CPU, bfloat16 is multiplied as float32: PyTorch's kernel for bfloat16's backward
    pass takes 2 to 6 times as long, and the result is nearer so (docs/performance.md).
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.requires_grad:
        with torch.autocast("cpu", enabled=False):
            found = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
        return found.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP over [b, n, width]."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, past: KeyValues | PrefixKeyValues | None = None) -> Tensor:
        """mask, broadcast to [b, heads, n, n]: True where a query (row) may look at a key (column).

        With `past`, x holds the tokens after those read before, and keys (columns) are all tokens so far.
        """
        b, n, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = past.extend(k, v)
        attended = attend(q, k, v, mask)
        x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(b, n, width)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm_2(x)))))


class ResBlock(nn.Module):
    """ADM residual block: GroupNorm with scale and shift from the time embedding, optionally halving or doubling the
    side inside the block (Dhariwal & Nichol 2021, section 3).

    scale_shift False: the time embedding is added before the norm instead (Ho et al. 2020).
    """

    def __init__(
        self,
        channels: int,
        out: int,
        time: int,
        *,
        groups: int,
        dropout: float = 0.0,
        resample: str = "",
        scale_shift: bool = True,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.scale_shift = scale_shift
        self.norm_1 = nn.GroupNorm(groups, channels)
        self.conv_1 = (UpConv2d if resample == "up" else Conv2d)(channels, out, 3, padding=1)
        self.time = nn.Linear(time, 2 * out if scale_shift else out)
        self.norm_2 = nn.GroupNorm(groups, out)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = zeroed(Conv2d(out, out, 3, padding=1))
        self.skip = nn.Identity() if channels == out else Conv2d(channels, out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [b, c, h, w], time [b, e] already through SiLU."""
        h = F.silu(self.norm_1(x))
        if isinstance(self.conv_1, UpConv2d):
            x, h = F.interpolate(x, scale_factor=2.0, mode="nearest"), self.conv_1.doubled(h)
        elif self.resample == "down":
            x, h = F.avg_pool2d(x, 2), self.conv_1(F.avg_pool2d(h, 2))
        else:
            h = self.conv_1(h)
        modulation = self.time(time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
            # The product is nobody else's, and no gradient needs it, so the sum may take its place.
            h = F.silu((self.norm_2(h) * (1 + scale)).add_(shift))
        else:
            h = F.silu(self.norm_2(h + modulation))
        return self.skip(x) + self.conv_2(self.dropout(h))


class ContextAttention(nn.Module):
    """Attention of every pixel to [context; pixels], each with projections of its own (GLIDE, Nichol et al. 2021)."""

    def __init__(self, channels: int, context: int, head_channels: int, groups: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context_kv = nn.Linear(context, 2 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def encode(self, tokens: Tensor) -> Tensor:
        """Keys and values [b, 2, heads, n, c / heads] of context tokens [b, n, context]; the same at every timestep."""
        b, n, _ = tokens.shape
        return self.context_kv(tokens).view(b, n, 2, self.heads, -1).permute(0, 2, 3, 1, 4)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """x [b, c, h, w]; context from `encode`; mask [b, n] True where a context token is to be seen."""
        b, c, height, width = x.shape
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(pixels).view(b, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        k, v = torch.cat([context[:, 0], k], 2), torch.cat([context[:, 1], v], 2)
        seen = F.pad(mask, (0, height * width), value=True)[:, None, None]
        attended = attend(q, k, v, seen)
        attended = self.out(attended.transpose(1, 2).reshape(b, height * width, c))
        return x + attended.transpose(1, 2).reshape(b, c, height, width)
