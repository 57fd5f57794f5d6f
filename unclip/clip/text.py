"""CLIP's text transformer (Radford et al. 2021, section 2.4), with open_clip's names of parameters, hence its weights.

Why not open_clip's own: its import takes seconds that `generate` does not have. Architectures beyond the usual one run
in open_clip's, behind the same face.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

USUAL = {
    "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pool_type", "no_causal_mask",
    "output_tokens", "pad_id", "eos_id", "proj_type", "proj_bias", "embed_cls", "tokenizer_kwargs",
}  # fmt: skip
"""Settings of open_clip's `text_cfg` that TextTower obeys, or that change nothing for it."""


class Text(NamedTuple):
    """Texts as CLIP sees them."""

    embedding: Tensor
    """z_t, raw [b, d]."""
    states: Tensor
    """Token states after the final norm, before the projection [b, L, w]."""
    mask: Tensor
    """[b, L], True from the start token to the end token."""


def foreign_settings(model: dict[str, Any]) -> list[str]:
    """Settings of an open_clip configuration that TextTower has no part for; empty where it can hold the model."""
    text = model["text_cfg"]
    foreign = sorted(key for key in text if key not in USUAL and text[key] not in (None, False))
    unusual = {"pool_type": "argmax", "proj_type": "linear"}
    return foreign + [key for key, usual in unusual.items() if text.get(key, usual) != usual]


def real_tokens(ids: Tensor) -> Tensor:
    """bool [b, L]: True up to the end token, which has the largest id of a row."""
    return torch.arange(ids.shape[1], device=ids.device) <= ids.argmax(1, keepdim=True)


class QuickGELU(nn.Module):
    """x·σ(1.702·x), which OpenAI's own weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class TextBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, quick_gelu: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, int(width * mlp_ratio)))
        self.mlp.add_module("gelu", QuickGELU() if quick_gelu else nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(int(width * mlp_ratio), width))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        b, n, width = x.shape
        packed = F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias)
        q, k, v = packed.view(b, n, 3, self.attn.num_heads, width // self.attn.num_heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + self.attn.out_proj(attended.transpose(1, 2).reshape(b, n, width))
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    """Only there to give parameters open_clip's names."""

    def __init__(self, blocks: list[TextBlock]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)


class TextTower(nn.Module):
    """Token ids [b, n], with n at most the context L → Text."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        text = model["text_cfg"]
        width, heads = text.get("width", 512), text.get("heads", 8)
        self.causal = not text.get("no_causal_mask", False)
        self.token_embedding = nn.Embedding(text.get("vocab_size", 49_408), width)
        self.positional_embedding = nn.Parameter(torch.zeros(text.get("context_length", 77), width))
        quick_gelu, mlp_ratio = bool(model.get("quick_gelu", False)), text.get("mlp_ratio", 4.0)
        self.transformer = Blocks(
            [TextBlock(width, heads, mlp_ratio, quick_gelu) for _ in range(text.get("layers", 12))]
        )
        self.ln_final = nn.LayerNorm(width)
        if text.get("proj_bias", False):
            self.text_projection: nn.Module | nn.Parameter = nn.Linear(width, model["embed_dim"])
        else:
            self.text_projection = nn.Parameter(torch.zeros(width, model["embed_dim"]))

    def forward(self, ids: Tensor) -> Text:
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        for block in self.transformer.resblocks:
            x = block(x, self.causal)
        states = self.ln_final(x)
        pooled = states[torch.arange(len(ids), device=ids.device), ids.argmax(1)]
        projection = self.text_projection
        embedding = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        return Text(embedding, states, real_tokens(ids))


class OpenClipText(nn.Module):
    """The same face over an open_clip model, for text towers that TextTower does not hold."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Text:
        seen: list[Tensor] = []
        text: Any = getattr(self.model, "text", self.model)
        hook = text.ln_final.register_forward_hook(lambda _module, _inputs, states: seen.append(states))
        try:
            embedding = self.model.encode_text(ids)  # type: ignore[operator]
        finally:
            hook.remove()
        return Text(embedding.float(), seen[0].float(), real_tokens(ids))
