"""Text on its way into the models: what stands for a dropped caption, and a transformer over CLIP's token states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unclip.layers import TransformerBlock


class NullText(nn.Module):
    """What stands for a dropped caption: CLIP's own embedding and token states of the empty text.

    Buffers, so that they travel with the weights: `embedding` [d], `states` [L, w], `mask` [L] bool.
    """

    embedding: Tensor
    states: Tensor
    mask: Tensor

    def __init__(self, context: int, embedding_width: int, states_width: int) -> None:
        super().__init__()
        self.register_buffer("embedding", torch.zeros(embedding_width))
        self.register_buffer("states", torch.zeros(context, states_width))
        self.register_buffer("mask", torch.arange(context) < 1)

    @torch.no_grad()
    def set(self, embedding: Tensor, states: Tensor, mask: Tensor) -> None:
        """Store CLIP's view of the empty text: [d], [L, w], [L] bool."""
        self.embedding.copy_(embedding)
        self.states.copy_(states)
        self.mask.copy_(mask)

    def expand(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """(embedding [b, d], states [b, L, w], mask [b, L])."""
        return (
            self.embedding.expand(batch, -1),
            self.states.expand(batch, -1, -1),
            self.mask.expand(batch, -1),
        )

    def forward(self, embedding: Tensor, states: Tensor, mask: Tensor, drop: Tensor | None) -> tuple[Tensor, ...]:
        """The captions, with the empty text where drop [b] is True."""
        if drop is None:
            return embedding, states, mask
        empty = self.expand(len(drop))
        return (
            torch.where(drop[:, None], empty[0], embedding),
            torch.where(drop[:, None, None], empty[1], states),
            torch.where(drop[:, None], empty[2], mask),
        )


class TextEncoder(nn.Module):
    """Token states [b, L, w_in] → context tokens [b, L, width]: a projection, `depth` transformer blocks, a norm.

    With depth 0 it is projection and norm alone, as diffusers has it. With blocks, learned positions tell words of
    equal meaning apart by their place, which a small CLIP's states hardly do.
    """

    def __init__(self, context: int, states_width: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.project = nn.Linear(states_width, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width)) if depth else None
        self.blocks = nn.ModuleList([TransformerBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """mask [b, L] True at real tokens; what padding holds never reaches another token."""
        h = self.project(states)
        if self.positions is not None:
            h = h + self.positions
        for block in self.blocks:
            h = block(h, mask[:, None, None])
        return self.norm(h)
