"""The decoder: a diffusion model of pictures given a CLIP image embedding and, optionally, the caption (section 2.1).

z_i is added to the time embedding and given as four extra context tokens; the caption's token states follow them. Both
may be dropped per sample, by masks that the caller draws, for classifier-free guidance.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unclip.config import TIMESTEPS, WIDTH, Range, outside
from unclip.errors import Refused
from unclip.schedule import Prediction, Schedule, check_process
from unclip.text import NullText, TextEncoder
from unclip.unet import UNet, UNetConfig

IMAGE_TOKENS = 4
"""Context tokens made of z_i (section 2.1)."""


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and process of a decoder."""

    size: int
    """Side of the pictures, in pixels."""
    embedding: int
    """Width d of CLIP's image and text embeddings."""
    text_width: int
    """Width of CLIP's text token states."""
    context: int
    """Tokens of CLIP's text context."""
    channels: int
    """Channels of the first level."""
    multiples: tuple[int, ...]
    """Channels of each level, as multiples of the first."""
    depth: int
    """Residual blocks a level."""
    attention: tuple[int, ...]
    """Sides, in (unshuffled) pixels, of the levels that attend."""
    head_channels: int = 64
    """Channels of an attention head."""
    context_width: int = 512
    """Width of the context tokens."""
    text_depth: int = 0
    """Transformer blocks over the token states before they become context; 0 projects them only."""
    text_heads: int = 8
    """Heads of those blocks."""
    groups: int = 32
    """Groups of every GroupNorm."""
    dropout: float = 0.0
    """Dropout in residual blocks."""
    unshuffle: int = 1
    """Fold squares of this side into channels at the input, unfold at the output."""
    position: bool = False
    """Add a learned map to every level."""
    learned_range: bool = False
    """Output a range of variances beside the mean: six channels."""
    prediction: str = "eps"
    """What the network outputs: x0, eps or v."""
    schedule: str = "cosine"
    """Noise schedule: cosine or linear."""
    timesteps: int = 1000
    """Timesteps of the process."""
    first_stage: str = "identity"
    """What the diffusion runs on: identity means pixels."""

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("embedding", "text_width", "context", "text_heads"), WIDTH)
        if wrong := outside(self, **sizes, text_depth=Range(0, WIDTH.most), timesteps=TIMESTEPS):
            raise Refused(f"decoder: {wrong}")
        check_process("decoder", self.prediction, self.schedule)
        if self.first_stage != "identity":
            raise Refused(f"decoder: first stage {self.first_stage!r} is unknown; use identity")
        _ = self.unet
        if self.text_depth and self.context_width % self.text_heads:
            raise Refused(f"decoder: a context of {self.context_width} does not divide into {self.text_heads} heads")

    @property
    def unet(self) -> UNetConfig:
        """The U-Net inside."""
        return UNetConfig(
            size=self.size,
            in_channels=3,
            out_channels=6 if self.learned_range else 3,
            channels=self.channels,
            multiples=self.multiples,
            depth=self.depth,
            attention=self.attention,
            head_channels=self.head_channels,
            context_width=self.context_width,
            groups=self.groups,
            dropout=self.dropout,
            unshuffle=self.unshuffle,
            position=self.position,
        )


class Context(NamedTuple):
    """All that the U-Net is told about a picture, made once for all timesteps."""

    addend: Tensor
    """[b, time_width], joins the time embedding."""
    keys_values: tuple[Tensor, ...]
    """For each attention, [b, 2, heads, 4 + L, head_channels]."""
    mask: Tensor
    """[b, 4 + L], True where a token is to be seen."""


class Decoder(nn.Module):
    """p(x | z_i, caption). Buffers `mean` and `std` [d] are those of raw image embeddings."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = UNet(config.unet)
        self.null_text = NullText(config.context, config.embedding, config.text_width)
        self.register_buffer("mean", torch.zeros(config.embedding))
        self.register_buffer("std", torch.ones(config.embedding))
        time = config.unet.time_width
        self.null_image = nn.Parameter(torch.zeros(config.embedding))
        self.image_time = nn.Linear(config.embedding, time)
        self.text_time = nn.Linear(config.embedding, time)
        self.image_tokens = nn.Linear(config.embedding, IMAGE_TOKENS * config.context_width)
        self.text = TextEncoder(
            config.context, config.text_width, config.context_width, config.text_depth, config.text_heads
        )

    @cached_property
    def schedule(self) -> Schedule:
        """The process this decoder was made for."""
        return Schedule.named(self.config.schedule, self.config.timesteps)

    def context(
        self,
        image_embedding: Tensor,
        text_embedding: Tensor,
        text_states: Tensor,
        text_mask: Tensor,
        drop_image: Tensor | None = None,
        drop_text: Tensor | None = None,
    ) -> Context:
        """Encode raw z_i [b, d], z_t [b, d], token states [b, L, w] and their mask [b, L].

        Where drop_image [b] is True a learned embedding stands for z_i; where drop_text [b] is True, the empty text for
        the caption.
        """
        image = (image_embedding - self.mean) / self.std
        if drop_image is not None:
            image = torch.where(drop_image[:, None], self.null_image, image)
        return self._encode(image, *self.null_text(text_embedding, text_states, text_mask, drop_text))

    def null_context(self, batch: int) -> Context:
        """No image embedding and the empty text, for guidance."""
        return self._encode(self.null_image.expand(batch, -1), *self.null_text.expand(batch))

    def _encode(self, image: Tensor, text: Tensor, states: Tensor, mask: Tensor) -> Context:
        # Channel-major: a token's channels lie IMAGE_TOKENS apart in the projection, as diffusers has them.
        extra = self.image_tokens(image).view(len(image), -1, IMAGE_TOKENS).transpose(1, 2)
        tokens = torch.cat([extra, self.text(states, mask)], 1)
        addend = self.image_time(image) + self.text_time(text)
        return Context(addend, self.unet.encode(tokens), nn.functional.pad(mask, (IMAGE_TOKENS, 0), value=True))

    def forward(self, x: Tensor, t: Tensor, context: Context) -> Tensor:
        """x [b, 3, s, s] noised pictures in [-1, 1], t [b] → the network's output [b, 3 or 6, s, s]."""
        return self.unet(x, t, context.addend, context.keys_values, context.mask)

    def predict(self, output: Tensor, x: Tensor, t: Tensor) -> Prediction:
        """Read the network's output at noised x."""
        return self.schedule.predict(self.config.prediction, output, x, t, learned_range=self.config.learned_range)

    def denoise(self, x: Tensor, t: Tensor, context: Context) -> Prediction:
        """The network as samplers and guidance want it."""
        return self.predict(self(x, t, context), x, t)
