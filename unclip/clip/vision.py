"""CLIP's image towers (Radford et al. 2021, section 2.4): ViT and ResNet, with open_clip's names of parameters.

Why not open_clip's own: importing it takes each worker four seconds of a core before its first picture. What these do
not hold (timm's towers, attention pooling, other norms) runs in open_clip's. Tests hold both equal, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.clip.text import QuickGELU

USUAL = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "patch_dropout", "eager_attention"}
"""Settings of open_clip's `vision_cfg` that these towers obey, or that change nothing outside of training."""
DEFAULTS = {
    "pool_type": "tok",
    "pos_embed_type": "learnable",
    "attn_pooler_queries": 256,
    "attn_pooler_heads": 8,
    "timm_pool": "avg",
    "timm_proj": "linear",
    "timm_drop": 0.0,
}
"""Settings that may be there at these values, at which they change nothing."""
EXPANSION = 4
"""Channels that a ResNet's block gives, for each that it computes with."""


def foreign_vision_settings(model: dict[str, Any]) -> list[str]:
    """Settings of an open_clip configuration that no tower here has a part for; empty where one can hold the model."""
    vision = model["vision_cfg"]
    return sorted(
        key
        for key, value in vision.items()
        if key not in USUAL and value not in (None, False, "") and DEFAULTS.get(key) != value
    )


def image_tower(model: dict[str, Any]) -> nn.Module:
    """The tower of a configuration without foreign settings: pixels [b, 3, size, size] → embeddings [b, d]."""
    vision = {"image_size": 224, "layers": 12, "width": 768, "head_width": 64, "patch_size": 16, "mlp_ratio": 4.0}
    vision |= {key: value for key, value in model["vision_cfg"].items() if key in vision}
    if isinstance(vision["layers"], (list, tuple)):
        return ResNet(model["embed_dim"], vision)
    return VisionTransformer(model["embed_dim"], vision, quick_gelu=bool(model.get("quick_gelu", False)))


class ImageBlock(nn.Module):
    """Pre-norm attention and MLP over all tokens."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, quick_gelu: bool) -> None:
        super().__init__()
        inside = int(width * mlp_ratio)
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, inside))
        self.mlp.add_module("gelu", QuickGELU() if quick_gelu else nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(inside, width))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    """Blocks in a row, under open_clip's name for them."""

    def __init__(self, blocks: list[ImageBlock]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class VisionTransformer(nn.Module):
    """A ViT with a class token, whose final state is projected to the embedding."""

    def __init__(self, embedding: int, vision: dict[str, Any], *, quick_gelu: bool) -> None:
        super().__init__()
        width, patch = vision["width"], vision["patch_size"]
        heads, patches = width // vision["head_width"], (vision["image_size"] // patch) ** 2
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Blocks(
            [ImageBlock(width, heads, vision["mlp_ratio"], quick_gelu) for _ in range(vision["layers"])]
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, embedding))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).permute(0, 2, 1)
        first = self.class_embedding.view(1, 1, -1).expand(len(pixels), -1, -1)
        x = self.ln_pre(torch.cat([first.to(patches.dtype), patches], 1) + self.positional_embedding)
        return self.ln_post(self.transformer(x))[:, 0] @ self.proj


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions beside a shortcut; a stride is an average pool, so that nothing aliases."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = channels * EXPANSION
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample: nn.Sequential | None = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", nn.AvgPool2d(stride))
            self.downsample.add_module("0", nn.Conv2d(inputs, outputs, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu_()
        out = self.avgpool(self.bn2(self.conv2(out)).relu_())
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return out.relu_()


class AttentionPool(nn.Module):
    """Attention of the mean over all places [b, c, h, w] → [b, d]."""

    def __init__(self, side: int, width: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(side**2 + 1, width))
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, outputs)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).permute(2, 0, 1)
        tokens = torch.cat([tokens.mean(0, keepdim=True), tokens])
        tokens = tokens + self.positional_embedding[:, None].to(tokens.dtype)
        bias = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        pooled, _ = F.multi_head_attention_forward(
            tokens, tokens, tokens, tokens.shape[-1], self.heads, None, bias, None, None, False, 0.0,
            self.c_proj.weight, self.c_proj.bias, training=self.training, need_weights=False,
            use_separate_proj_weight=True, q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
        )  # fmt: skip
        return pooled[0]


class ResNet(nn.Module):
    """A stem of three convolutions, four levels of bottlenecks, and attention pooling."""

    def __init__(self, embedding: int, vision: dict[str, Any]) -> None:
        super().__init__()
        width, heads = vision["width"], vision["width"] * 32 // vision["head_width"]
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        inputs = width
        for level, count in enumerate(vision["layers"]):
            channels, blocks = width << level, []
            for number in range(count):
                blocks.append(Bottleneck(inputs, channels, 2 if level and not number else 1))
                inputs = channels * EXPANSION
            self.add_module(f"layer{level + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool(vision["image_size"] // 32, width * 32, heads, embedding)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.bn1(self.conv1(pixels)).relu_()
        x = self.bn2(self.conv2(x)).relu_()
        x = self.avgpool(self.bn3(self.conv3(x)).relu_())
        for level in ("layer1", "layer2", "layer3", "layer4"):
            x = self.get_submodule(level)(x)
        return self.attnpool(x)
