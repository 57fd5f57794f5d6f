"""The diffusion prior: from a caption's CLIP embedding and token states to a CLIP image embedding (section 2.2).

A causal transformer over text tokens, z_t, timestep, noised z_i and a query whose output is the clean z_i. It works on
embeddings standardised per dimension; the statistics are buffers, so they belong to the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from unclip.config import DEPTH, LATER, POSITIVE, SHARE, TIMESTEPS, WIDTH, outside
from unclip.diffusion import Denoiser, Prediction, Schedule, check_process, clip_x0
from unclip.errors import Refused
from unclip.models.layers import KeyValues, PrefixKeyValues, TimeEmbedding, TransformerBlock
from unclip.models.text import NullText


@dataclass(frozen=True)
class CaptionTransformer:
    """What both priors are: a causal transformer that reads a caption as CLIP sees it."""

    embedding: int
    """Width d of CLIP's image and text embeddings."""
    text_width: int
    """Width of CLIP's text token states."""
    context: int
    """Tokens of CLIP's text context."""
    width: int
    """Width of the transformer."""
    depth: int
    """Transformer blocks."""
    heads: int
    """Attention heads; they divide the width."""
    dropout: float = 0.0
    """Dropout after attention and MLP."""

    called: ClassVar[str]
    """What a refusal calls the model."""

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("embedding", "text_width", "context", "width", "heads"), WIDTH)
        if wrong := outside(self, **sizes, depth=DEPTH, dropout=SHARE):
            raise Refused(f"{self.called}: {wrong}")
        if self.width % self.heads:
            raise Refused(f"{self.called}: a width of {self.width} does not divide into {self.heads} heads")


@dataclass(frozen=True)
class PriorConfig(CaptionTransformer):
    """Shape and process of a diffusion prior."""

    prediction: str = "x0"
    """What the network outputs: x0, eps or v."""
    schedule: str = "cosine"
    """Noise schedule: cosine or linear."""
    timesteps: int = 1000
    """Timesteps of the process."""
    clip_range: float | None = field(default=None, metadata=LATER)
    """Sampling clamps the predicted standardised x0 to ± this (Karlo: 5); None leaves it as it is."""
    called: ClassVar[str] = "prior"

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := outside(self, timesteps=TIMESTEPS, clip_range=POSITIVE):
            raise Refused(f"{self.called}: {wrong}")
        check_process(self.called, self.prediction, self.schedule)


class PriorContext(NamedTuple):
    """A caption as the prior sees it: embedding [b, d], token states [b, L, w], mask [b, L] True at real tokens."""

    text_embedding: Tensor
    text_states: Tensor
    text_mask: Tensor


class PriorMemory(NamedTuple):
    """Captions that a prior has read: its tokens are causal, so the text's and z_t's say the same at every timestep."""

    keys_values: tuple[Tensor, ...]
    """For each block, [b, 2, heads, L + 1, c]."""
    mask: Tensor
    """[b, L + 1], True where a token is to be seen."""


class DiffusionPrior(nn.Module):
    """p(z_i | caption). Buffers `mean` and `std` [d] are those of raw image embeddings."""

    mean: Tensor
    std: Tensor
    causal: Tensor

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.null_text = NullText(config.context, config.embedding, config.text_width)
        self.register_buffer("mean", torch.zeros(config.embedding))
        self.register_buffer("std", torch.ones(config.embedding))
        self.time = TimeEmbedding(width, width)
        self.embed_states = nn.Linear(config.text_width, width)
        self.embed_text = nn.Linear(config.embedding, width)
        self.embed_image = nn.Linear(config.embedding, width)
        self.query = nn.Parameter(0.02 * torch.randn(width))
        length = config.context + 4
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(
            [TransformerBlock(width, config.heads, config.dropout) for _ in range(config.depth)]
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, config.embedding)
        self.register_buffer("causal", torch.ones(length, length, dtype=torch.bool).tril(), persistent=False)

    @cached_property
    def schedule(self) -> Schedule:
        """The process this prior was made for."""
        return Schedule.named(self.config.schedule, self.config.timesteps)

    def standardise(self, embedding: Tensor) -> Tensor:
        """Raw image embeddings [b, d] → zero mean and unit deviation per dimension."""
        return (embedding - self.mean) / self.std

    def destandardise(self, z: Tensor) -> Tensor:
        """The inverse of `standardise`."""
        return z * self.std + self.mean

    def context(
        self, text_embedding: Tensor, text_states: Tensor, text_mask: Tensor, drop_text: Tensor | None = None
    ) -> PriorContext:
        """Captions with the empty text where drop_text [b] is True."""
        return PriorContext(*self.null_text(text_embedding, text_states, text_mask, drop_text))

    def null_context(self, batch: int) -> PriorContext:
        """The empty text, for guidance."""
        return PriorContext(*self.null_text.expand(batch))

    def forward(self, z: Tensor, t: Tensor, text_embedding: Tensor, text_states: Tensor, text_mask: Tensor) -> Tensor:
        """z [b, d] standardised and noised, t [b] → output [b, d], by default x0, standardised."""
        tail = [self.embed_text(text_embedding), self.time(t), self.embed_image(z), self.query.expand(len(z), -1)]
        h = torch.cat([self.embed_states(text_states), torch.stack(tail, 1)], 1) + self.positions
        mask = self._mask(nn.functional.pad(text_mask, (0, 4), value=True))
        for block in self.blocks:
            h = block(h, mask)
        return self.out(self.norm(h[:, -1]))

    @torch.no_grad()
    def read(self, context: PriorContext) -> PriorMemory:
        """The captions' share of a sampling, computed once for all of its steps."""
        h = torch.cat([self.embed_states(context.text_states), self.embed_text(context.text_embedding)[:, None]], 1)
        h = h + self.positions[: h.shape[1]]
        seen = nn.functional.pad(context.text_mask, (0, 1), value=True)
        mask, found = self._mask(seen), []
        for block in self.blocks:
            past = KeyValues(h.shape[1])
            h = block(h, mask, past)
            found.append(past.remembered())
        return PriorMemory(tuple(found), seen)

    def resume(self, z: Tensor, t: Tensor, memory: PriorMemory) -> Tensor:
        """As `forward`, after captions that were read before: three tokens instead of L + 4."""
        h = torch.stack([self.time(t), self.embed_image(z), self.query.expand(len(z), -1)], 1)
        h = h + self.positions[-3:]
        seen = nn.functional.pad(memory.mask, (0, 3), value=True)
        mask = (self.causal[-3:] & seen[:, None])[:, None]
        for block, keys_values in zip(self.blocks, memory.keys_values, strict=True):
            h = block(h, mask, PrefixKeyValues(keys_values))
        return self.out(self.norm(h[:, -1]))

    def _mask(self, seen: Tensor) -> Tensor:
        """Who may look at whom, [b, 1, n, n], among the first n tokens, of which `seen` [b, n] are no padding."""
        n = seen.shape[1]
        # A row of padding may see itself: a softmax over nothing would be NaN, and nobody reads that row.
        itself = torch.eye(n, dtype=torch.bool, device=seen.device)
        return (self.causal[:n, :n] & (seen[:, None] | itself))[:, None]

    def predict(self, output: Tensor, x: Tensor, t: Tensor) -> Prediction:
        """Read the network's output at noised x [b, d]."""
        return self.schedule.predict(self.config.prediction, output, x, t)

    def denoise(self, z: Tensor, t: Tensor, context: PriorContext | PriorMemory) -> Prediction:
        """The network as samplers and guidance want it; faster with what `read` made of the context."""
        output = self.resume(z, t, context) if isinstance(context, PriorMemory) else self(z, t, *context)
        return self.predict(output, z, t)

    def in_range(self, denoise: Denoiser) -> Denoiser:
        """A denoiser of this prior, guided or not, as it is sampled: its clean samples keep to `clip_range`."""
        limit = self.config.clip_range
        return denoise if limit is None else clip_x0(denoise, self.schedule, -limit, limit)
