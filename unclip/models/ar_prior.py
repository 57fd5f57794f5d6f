"""The autoregressive prior: a CLIP image embedding as a sentence of buckets, written one by one (section 2.2).

A causal transformer over text tokens, z_t, a token of the dot product z_i·z_t, and the first k principal coordinates of
z_i, each cut into buckets. What bounds the buckets comes from the training data and belongs to the model:
- coordinates have equal buckets between ± `reach` of their standard deviations;
- the dot product (of raw embeddings, as best-of-N compares them) has buckets that are equally frequent in the data, so
  that the top half of its buckets is the top half of its distribution: that of all captions, not of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from unclip.config import DEPTH, POSITIVE, WIDTH, Range, outside
from unclip.diffusion import Noise, join
from unclip.errors import Refused
from unclip.models.layers import KeyValues, TransformerBlock
from unclip.models.pca import Pca, components_for, dequantise, quantise
from unclip.models.prior import CaptionTransformer, DiffusionPrior, PriorContext
from unclip.models.text import NullText, TextEncoder


@dataclass(frozen=True)
class AutoregressivePriorConfig(CaptionTransformer):
    """Shape of an autoregressive prior."""

    components: int | None = None
    """Principal components k that are kept of d; null: as many as `explained` asks of the training data."""
    explained: float = 0.99
    """Share of the variance to keep where `components` is null (the paper's 319 of 1024 lose less than 1 %)."""
    buckets: int = 1024
    """Buckets of each coordinate, and of the dot product."""
    reach: float = 4.0
    """Coordinates are cut into equal buckets between ± this many standard deviations, and clipped beyond: 4 clips one
    Gaussian coordinate in 16,000, and with 1024 buckets is wrong by at most 1/256 of a deviation."""
    context_width: int | None = None
    """Width of the text encoder; null: the transformer's."""
    text_depth: int = 0
    """Blocks of a text encoder over CLIP's token states, before the causal transformer; 0 projects them only."""
    text_heads: int = 8
    """Heads of those blocks."""

    called: ClassVar[str] = "autoregressive prior"

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges = {"context_width": WIDTH, "text_heads": WIDTH, "text_depth": Range(0, DEPTH.most)}
        buckets = Range(2, WIDTH.most)
        if wrong := outside(self, **ranges, explained=Range(0, 1, above=True), buckets=buckets, reach=POSITIVE):
            raise Refused(f"{self.called}: {wrong}")
        if self.text_depth and self.encoder_width % self.text_heads:
            raise Refused(
                f"autoregressive prior: a text encoder of {self.encoder_width} "
                f"does not divide into {self.text_heads} heads"
            )
        if not 1 <= self.kept <= self.embedding:
            raise Refused(
                f"autoregressive prior: components is {self.components}; "
                f"it lies between 1 and the embedding's width, {self.embedding}"
            )

    @property
    def encoder_width(self) -> int:
        """Width of the text encoder."""
        return self.width if self.context_width is None else self.context_width

    @property
    def kept(self) -> int:
        """Principal components k; all of them as long as nobody has chosen."""
        return self.embedding if self.components is None else self.components

    @property
    def tokens(self) -> int:
        """Tokens that are written: the dot product's and k coordinates'."""
        return 1 + self.kept

    def fitted(self, eigenvalues: Tensor) -> AutoregressivePriorConfig:
        """This configuration with its components chosen, for data of those eigenvalues [d], falling."""
        if self.components is not None:
            return self
        return replace(self, components=components_for(eigenvalues, self.explained))


class AutoregressivePrior(nn.Module):
    """p(z_i | caption) as a product over tokens. Buffers: `pca`'s, and `dot_edges` [buckets - 1]."""

    dot_edges: Tensor

    def __init__(self, config: AutoregressivePriorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.null_text = NullText(config.context, config.embedding, config.text_width)
        self.pca = Pca(config.embedding, config.kept)
        self.register_buffer("dot_edges", torch.linspace(-1, 1, config.buckets + 1)[1:-1])
        self.text = TextEncoder(
            config.context, config.text_width, config.encoder_width, config.text_depth, config.text_heads
        )
        self.embed_states = nn.Linear(config.encoder_width, width)
        self.embed_text = nn.Linear(config.embedding, width)
        self.token_embedding = nn.Embedding(config.buckets, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        length = config.context + config.tokens  # the last token is written and never read; z_t takes its place
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(
            [TransformerBlock(width, config.heads, config.dropout) for _ in range(config.depth)]
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, config.buckets)

    @torch.no_grad()
    def set_dots(self, dots: Tensor) -> None:
        """Bounds the dot product's buckets so that each holds equally many of these [n], dots of the training data."""
        if not len(dots):
            raise Refused("autoregressive prior: no row of the data is left to bound the dot product's buckets by")
        inner = torch.linspace(0, 1, self.config.buckets + 1, dtype=torch.float64, device=dots.device)[1:-1]
        self.dot_edges.copy_(torch.quantile(dots.double(), inner))

    def context(
        self, text_embedding: Tensor, text_states: Tensor, text_mask: Tensor, drop_text: Tensor | None = None
    ) -> PriorContext:
        """Captions with the empty text where drop_text [b] is True."""
        return PriorContext(*self.null_text(text_embedding, text_states, text_mask, drop_text))

    def null_context(self, batch: int) -> PriorContext:
        """The empty text, for guidance."""
        return PriorContext(*self.null_text.expand(batch))

    def tokenise(self, image_embedding: Tensor, text_embedding: Tensor) -> Tensor:
        """Raw embeddings [b, d] → tokens, int64 [b, 1 + k]: the dot product's bucket, then the coordinates'."""
        dot = torch.bucketize((image_embedding * text_embedding).sum(1), self.dot_edges)
        codes = quantise(self.pca.project(image_embedding), self.config.buckets, self.config.reach)
        return torch.cat([dot[:, None], codes], 1)

    def embedding(self, tokens: Tensor) -> Tensor:
        """The raw image embeddings [b, d] that tokens [b, 1 + n] say; coordinates not yet written are at their mean."""
        return self.pca.reconstruct(dequantise(tokens[:, 1:], self.config.buckets, self.config.reach))

    def forward(self, tokens: Tensor, text_embedding: Tensor, text_states: Tensor, text_mask: Tensor) -> Tensor:
        """tokens [b, n], n ≤ k → logits [b, n + 1, buckets] of tokens 0 to n, each seeing those before it alone."""
        h, seen = self._prefix(PriorContext(text_embedding, text_states, text_mask))
        h = torch.cat([h, self._embed(tokens, h.shape[1])], 1)
        h = self._read(h, nn.functional.pad(seen, (0, tokens.shape[1]), value=True))
        return self._logits(h[:, self.config.context :])

    def _prefix(self, context: PriorContext) -> tuple[Tensor, Tensor]:
        """What stands before the first token, [b, L + 1, width], and which of it may be seen, [b, L + 1]."""
        states = self.embed_states(self.text(context.text_states, context.text_mask))
        h = torch.cat([states, self.embed_text(context.text_embedding)[:, None]], 1)
        return h + self.positions[: h.shape[1]], nn.functional.pad(context.text_mask, (0, 1), value=True)

    def _embed(self, tokens: Tensor, place: int) -> Tensor:
        """Tokens [b, n], the first of which stands at that place of the sequence."""
        return self.token_embedding(tokens) + self.positions[place : place + tokens.shape[1]]

    def _read(self, h: Tensor, seen: Tensor, past: list[KeyValues] | None = None) -> Tensor:
        """The blocks over the last n places of a sequence, h [b, n, width], of which `seen` [b, m ≥ n] may be seen."""
        place = torch.arange(seen.shape[1], device=h.device)
        here = place[-h.shape[1] :, None]
        # A row of padding may see itself: a softmax over nothing would be NaN, and nobody reads that row.
        mask = ((place <= here) & (seen[:, None] | (place == here)))[:, None]
        for number, block in enumerate(self.blocks):
            h = block(h, mask, past[number] if past else None)
        return h

    def _logits(self, h: Tensor) -> Tensor:
        """[b, n, width] behind the blocks → logits [b, n, buckets] of the tokens that follow."""
        return self.out(self.norm(h))


class CachedDecoding:
    """An autoregressive prior that reads one token at a time and remembers keys and values of all before."""

    def __init__(self, prior: AutoregressivePrior, context: PriorContext) -> None:
        h, self._seen = prior._prefix(context)
        self._prior = prior
        self._past = [KeyValues(len(prior.positions)) for _ in prior.blocks]
        self.logits = self._next(h)
        """[b, buckets] of the token that comes next."""

    def read(self, token: Tensor) -> None:
        """Goes on by one token, [b]."""
        h = self._prior._embed(token[:, None], self._seen.shape[1])
        self._seen = nn.functional.pad(self._seen, (0, 1), value=True)
        self.logits = self._next(h)

    def _next(self, h: Tensor) -> Tensor:
        return self._prior._logits(self._prior._read(h, self._seen, self._past)[:, -1])


@torch.no_grad()
def sample_tokens(
    prior: AutoregressivePrior,
    context: PriorContext,
    null: PriorContext,
    noise: Noise,
    *,
    guidance: float = 1.0,
    temperature: float = 1.0,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Tokens [b, 1 + k] for captions, the dot product's from the top half of its buckets.

    guidance: logits are (1 - ω)·null + ω·condition, both read in one batched call; ω = 1 is unguided and reads the
    condition alone. temperature: 0 takes the likeliest token each time. noise(j): standard normals [b, buckets] for
    token j, of each row's own seed (`noise_for`). callback(j, tokens so far [b, j]) after each token.
    """
    reading = CachedDecoding(prior, context if guidance == 1 else join(context, null))
    tokens: list[Tensor] = []
    for place in range(prior.config.tokens):
        if tokens:
            reading.read(tokens[-1] if guidance == 1 else tokens[-1].repeat(2))
        logits = reading.logits
        if guidance != 1:
            given, without = logits.chunk(2)
            logits = (1 - guidance) * without + guidance * given
        if place == 0:
            bucket = torch.arange(logits.shape[1], device=logits.device)
            logits = logits.masked_fill(bucket < prior.config.buckets // 2, -torch.inf)
        tokens.append((logits + temperature * gumbel(noise(place))).argmax(1))
        if callback is not None:
            callback(place + 1, torch.stack(tokens, 1))
    return torch.stack(tokens, 1)


def gumbel(normal: Tensor) -> Tensor:
    """Standard normal → standard Gumbel noise, by its quantile: the argmax of logits plus it is a draw from them."""
    return -(-torch.special.log_ndtr(normal)).log()


Prior = DiffusionPrior | AutoregressivePrior
