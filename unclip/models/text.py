"""Text on its way into the models: what stands for a dropped caption, and transformers over CLIP's token states or over
the tokens themselves.

A caption is a tuple of tensors, batch first: (embedding [b, d], states [b, L, w], mask [b, L]) as CLIP reads it, or
(tokens int64 [b, L],) for a model that reads it itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unclip.clip import real_tokens
from unclip.models.layers import TransformerBlock

Caption = tuple[Tensor, ...]
"""A batch of captions as a model takes them; see above."""


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


class NullTokens(nn.Module):
    """What stands for a dropped caption where the model reads tokens: those of the empty text (GLIDE, section 2.3).

    A buffer `tokens` [L], so that it travels with the weights.
    """

    tokens: Tensor

    def __init__(self, context: int) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros(context, dtype=torch.long))

    @torch.no_grad()
    def set(self, tokens: Tensor) -> None:
        """Store the tokens of the empty text, [L]."""
        self.tokens.copy_(tokens)

    def expand(self, batch: int) -> tuple[Tensor]:
        """(tokens [b, L],)."""
        return (self.tokens.expand(batch, -1),)

    def forward(self, tokens: Tensor, drop: Tensor | None) -> tuple[Tensor]:
        """The captions, with the empty text where drop [b] is True."""
        return (tokens if drop is None else torch.where(drop[:, None], self.tokens, tokens),)


class TokenEncoder(nn.Module):
    """A text transformer over tokens, trained together with what reads it (GLIDE, Nichol et al. 2021, section 3).

    Table, learned positions, `depth` blocks in which every token sees every other, a norm. Two things are not GLIDE's:
    it fills the context with a learned padding and lets all see it, here padding is masked, so that what stands behind
    a caption's end, and how much of it, reaches nothing; and it pools at the context's last place, here the end token
    does, which every caption has.
    """

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.ModuleList([TransformerBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [b, L], as unclip.clip.tokenizer writes them → (the end token's state [b, w], states [b, L, w], mask
        [b, L], True up to the end token)."""
        mask = real_tokens(tokens)
        h = self.embedding(tokens) + self.positions
        for block in self.blocks:
            h = block(h, mask[:, None, None])
        states = self.norm(h)
        return states[torch.arange(len(tokens), device=tokens.device), tokens.argmax(1)], states, mask
