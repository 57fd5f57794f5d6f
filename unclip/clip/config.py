"""What a CLIP that is to be trained may be: open_clip's model configuration, field by field, and what cannot be built.

open_clip takes a dict and trusts it, so that a wrong number shows hours later, in a layer's constructor. A loaded CLIP
is not held against this: its weights prove that its configuration can be built. Left out are open_clip's attention
variants (qk_norm, scale_…) and what the adapter cannot hold (CoCa, Hugging Face's texts): see `model.check`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from unclip.clip.tokenizer import CLIP_VOCABULARY, FIXED
from unclip.config import AMOUNT, DEPTH, POSITIVE, SHARE, SIDE, WIDTH, Range, outside
from unclip.errors import Refused

MOST_TOKENS = Range(3, 4096)
"""Tokens of a context: start, end and at least one between."""
RESNET_GRAIN = 32
"""A ResNet halves its pictures five times."""


@dataclass(frozen=True)
class VisionConfig:
    """open_clip's `vision_cfg`: a ViT where `layers` is a number, a ResNet where it is four."""

    image_size: int = 224
    """Side of the pictures, in pixels."""
    layers: int | tuple[int, int, int, int] = 12
    """Blocks of a ViT, or of each of a ResNet's four levels."""
    width: int = 768
    """Width of a ViT, or of a ResNet's first level."""
    head_width: int = 64
    """Channels of an attention head; they divide a ViT's width, and 32 times a ResNet's."""
    mlp_ratio: float = 4.0
    """Width of a ViT's MLPs, as a multiple of its own."""
    patch_size: int = 16
    """Side of a ViT's patches, in pixels; it divides that of the picture."""
    ls_init_value: float | None = None
    """Start of LayerScale; none without it."""
    patch_dropout: float = 0.0
    """Share of the patches that a training step does not see."""
    pool_type: str = "tok"
    """tok or avg."""
    no_ln_pre: bool = False
    """Leave out the norm before a ViT's blocks."""
    final_ln_after_pool: bool = False
    """Norm after the pooling instead of before."""
    pos_embed_type: str = "learnable"
    """learnable or sin_cos_2d."""
    attentional_pool: bool = False
    """Pool a ViT by attention, instead of by `pool_type`."""
    attn_pooler_queries: int = 256
    """Queries of that attention."""
    attn_pooler_heads: int = 8
    """Its heads."""
    timm_model_name: str | None = None
    """A model of timm's as the tower, from its random start; then the numbers above count for nothing."""
    timm_pool: str = "avg"
    """timm's pooling: avg, abs_attn, rot_attn, or "" for the model's own."""
    timm_proj: str = "linear"
    """Projection of a timm model: linear, mlp, or "" for the model's own."""
    timm_proj_bias: bool = False
    """A bias in it."""
    timm_drop: float = 0.0
    """Dropout before it."""
    timm_drop_path: float | None = None
    """Stochastic depth."""

    def __post_init__(self) -> None:
        ranges = {"image_size": SIDE, "patch_size": SIDE, "mlp_ratio": POSITIVE, "patch_dropout": SHARE}
        sizes = dict.fromkeys(("width", "head_width", "attn_pooler_queries", "attn_pooler_heads"), WIDTH)
        drops = dict.fromkeys(("timm_drop", "timm_drop_path"), SHARE)
        if wrong := outside(self, **ranges, **sizes, **drops, layers=DEPTH, ls_init_value=AMOUNT):
            raise Refused(f"vision_cfg.{wrong}")
        for name, known in (("pool_type", ("tok", "avg")), ("pos_embed_type", ("learnable", "sin_cos_2d"))):
            if getattr(self, name) not in known:
                raise Refused(f"vision_cfg.{name} is {getattr(self, name)!r}; use one of {', '.join(known)}")
        if self.timm_model_name is not None:
            return
        resnet = isinstance(self.layers, tuple)
        grain, across = (RESNET_GRAIN, 32 * self.width) if resnet else (self.patch_size, self.width)
        if self.image_size % grain:
            why = "since a ResNet halves it five times" if resnet else "the patch_size"
            raise Refused(f"vision_cfg.image_size is {self.image_size}; it must be a multiple of {grain}, {why}")
        if across % self.head_width:
            raise Refused(f"vision_cfg.head_width is {self.head_width}; it must divide the attention's width, {across}")
        if resnet and self.width % 2:
            raise Refused(f"vision_cfg.width is {self.width}; a ResNet's must be even")


@dataclass(frozen=True)
class TextConfig:
    """open_clip's `text_cfg`, with CLIP's own tokeniser."""

    width: int
    """Width of the token states, which the prior and the decoder read."""
    context_length: int = 77
    """Tokens of a text, start and end included."""
    vocab_size: int = CLIP_VOCABULARY
    """Tokens that there are; fewer than CLIP's keep its first merges."""
    heads: int = 8
    """Attention heads; they divide the width."""
    layers: int = 12
    """Transformer blocks."""
    mlp_ratio: float = 4.0
    """Width of the MLPs, as a multiple of `width`."""
    ls_init_value: float | None = None
    """Start of LayerScale; none without it."""
    no_causal_mask: bool = False
    """Let a token see those behind it."""
    proj_bias: bool = False
    """A bias in the projection to the embedding."""

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("width", "heads"), WIDTH)
        ranges = {"layers": DEPTH, "context_length": MOST_TOKENS, "vocab_size": Range(FIXED, CLIP_VOCABULARY)}
        if wrong := outside(self, **sizes, **ranges, mlp_ratio=POSITIVE, ls_init_value=AMOUNT):
            raise Refused(f"text_cfg.{wrong}")
        if self.width % self.heads:
            raise Refused(f"text_cfg.heads is {self.heads}; it must divide the width, {self.width}")


@dataclass(frozen=True)
class ClipConfig:
    """open_clip's model configuration of a CLIP that is trained from its start."""

    embed_dim: int
    """Width d of image and text embeddings."""
    vision_cfg: VisionConfig
    """The image tower."""
    text_cfg: TextConfig
    """The text tower."""
    quick_gelu: bool = False
    """OpenAI's approximation of GELU."""
    custom_text: bool = False
    """open_clip's CustomTextCLIP, whose text tower is a module of its own."""
    init_logit_scale: float = math.log(1 / 0.07)
    """Start of the logarithm of the inverse temperature."""

    def __post_init__(self) -> None:
        if wrong := outside(self, embed_dim=WIDTH, init_logit_scale=Range(-100, 100)):
            raise Refused(wrong)
