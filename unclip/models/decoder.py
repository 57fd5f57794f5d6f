"""The decoder: a diffusion model of pictures given a CLIP image embedding and, optionally, the caption (section 2.1).

z_i is added to the time embedding and given as four extra context tokens; the caption's token states follow them. Both
may be dropped per sample, by masks that the caller draws, for classifier-free guidance. The caption is read by the
frozen CLIP, or by a text transformer that is trained with the decoder; without z_i that is GLIDE (arXiv 2112.10741).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unclip.config import DEPTH, TIMESTEPS, UNSAID, WHOLE, WIDTH, Range, outside
from unclip.diffusion import Prediction, Schedule, check_process
from unclip.errors import Refused
from unclip.models.text import NullText, NullTokens, TextEncoder, TokenEncoder
from unclip.models.unet import UNet, UNetConfig

IMAGE_TOKENS = 4
"""Context tokens made of z_i (section 2.1)."""
TEXTS = ("clip", "own")
KNOWN = 4
"""Channels that say what is known of a picture: its colours, and where they are known (GLIDE, section 2.4)."""


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
    """Transformer blocks over the token states before they become context; 0 projects them only. Of `text: own`, the
    text transformer's, as wide as the context."""
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
    text: str = field(default="clip", metadata=UNSAID)
    """Who reads the caption: `clip` (z_t and the token states of the frozen CLIP) or `own` (a text transformer that is
    trained with the decoder, over the same tokens)."""
    vocabulary: int = field(default=0, metadata=UNSAID)
    """Tokens that CLIP's tokeniser knows, for `text: own`."""
    image: bool = field(default=True, metadata=UNSAID)
    """Draw from an image embedding; False: from prompts alone, without any prior (with `text: own`, GLIDE)."""
    inpaint: bool = field(default=False, metadata=UNSAID)
    """Take, beside x_t, what is known of the picture: four more channels of the input (GLIDE, section 2.4)."""

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("embedding", "text_width", "context", "text_heads"), WIDTH)
        if wrong := outside(self, **sizes, text_depth=Range(0, DEPTH.most), timesteps=TIMESTEPS, vocabulary=WHOLE):
            raise Refused(f"decoder: {wrong}")
        check_process("decoder", self.prediction, self.schedule)
        if self.first_stage != "identity":
            raise Refused(f"decoder: first stage {self.first_stage!r} is unknown; use identity")
        if self.text not in TEXTS:
            raise Refused(f"decoder: text {self.text!r} is unknown; use one of {', '.join(TEXTS)}")
        if self.text == "own" and (self.vocabulary < 1 or self.text_depth < 1):
            raise Refused(
                f"decoder: text own has {self.text_depth} blocks (text_depth) over {self.vocabulary} tokens "
                "(vocabulary); it needs at least one of each"
            )
        if self.text == "clip" and self.vocabulary:
            raise Refused("decoder: a vocabulary is for text own; CLIP's token states need none")
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
            beside=KNOWN if self.inpaint else 0,
        )


class Context(NamedTuple):
    """All that the U-Net is told about a picture, made once for all timesteps."""

    addend: Tensor
    """[b, time_width], joins the time embedding."""
    keys_values: tuple[Tensor, ...]
    """For each attention, [b, 2, heads, 4 + L, head_channels]."""
    mask: Tensor
    """[b, 4 + L], True where a token is to be seen."""
    known: Tensor | tuple[()] = ()
    """[b, 4, s, s], what is known of the picture (see `Decoder.knowing`); () is nothing."""


class Decoder(nn.Module):
    """p(x | z_i, caption). Buffers `mean` and `std` [d] are those of raw image embeddings.

    Without `config.image` there is no z_i, hence nothing that would read it: p(x | caption).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = UNet(config.unet)
        own, context, width = config.text == "own", config.context, config.context_width
        self.null_text: NullText | NullTokens = (
            NullTokens(context) if own else NullText(context, config.embedding, config.text_width)
        )
        time = config.unet.time_width
        # In this order, since it is the order in which a new decoder draws its random weights.
        if config.image:
            self.register_buffer("mean", torch.zeros(config.embedding))
            self.register_buffer("std", torch.ones(config.embedding))
            self.null_image = nn.Parameter(torch.zeros(config.embedding))
            self.image_time = nn.Linear(config.embedding, time)
        self.text_time = nn.Linear(width if own else config.embedding, time)
        if config.image:
            self.image_tokens = nn.Linear(config.embedding, IMAGE_TOKENS * width)
        self.text: TextEncoder | TokenEncoder = (
            TokenEncoder(config.vocabulary, context, width, config.text_depth, config.text_heads)
            if own
            else TextEncoder(context, config.text_width, width, config.text_depth, config.text_heads)
        )

    @cached_property
    def schedule(self) -> Schedule:
        """The process this decoder was made for."""
        return Schedule.named(self.config.schedule, self.config.timesteps)

    def context(
        self,
        image_embedding: Tensor | None,
        *caption: Tensor,
        drop_image: Tensor | None = None,
        drop_text: Tensor | None = None,
    ) -> Context:
        """Encode raw z_i [b, d] and the captions: z_t [b, d], token states [b, L, w] and their mask [b, L], or, for
        `text: own`, tokens [b, L].

        Where drop_image [b] is True a learned embedding stands for z_i; where drop_text [b] is True, the empty text for
        the caption. A decoder without `config.image` takes None for z_i. Raises Refused for the other of the two.
        """
        if self.config.image != (image_embedding is not None):
            raise Refused(f"this decoder draws from {'an image embedding' if self.config.image else 'prompts alone'}")
        image = None
        if image_embedding is not None:
            image = (image_embedding - self.mean) / self.std
            if drop_image is not None:
                image = torch.where(drop_image[:, None], self.null_image, image)
        return self._encode(image, *self.null_text(*caption, drop_text))

    def null_context(self, batch: int) -> Context:
        """No image embedding and the empty text, for guidance."""
        image = self.null_image.expand(batch, -1) if self.config.image else None
        return self._encode(image, *self.null_text.expand(batch))

    def _encode(self, image: Tensor | None, *caption: Tensor) -> Context:
        text, tokens, mask = self._read(*caption)
        addend = self.text_time(text)
        if image is not None:
            # Channel-major: a token's channels lie IMAGE_TOKENS apart in the projection, as diffusers has them.
            extra = self.image_tokens(image).view(len(image), -1, IMAGE_TOKENS).transpose(1, 2)
            tokens, mask = torch.cat([extra, tokens], 1), nn.functional.pad(mask, (IMAGE_TOKENS, 0), value=True)
            addend = self.image_time(image) + addend
        return Context(addend, self.unet.encode(tokens), mask)

    def _read(self, *caption: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(what joins the time embedding [b, e], context tokens [b, L, w], their mask [b, L])."""
        if isinstance(self.text, TokenEncoder):
            return self.text(*caption)
        embedding, states, mask = caption
        return embedding, self.text(states, mask), mask

    def knowing(self, context: Context, picture: Tensor, free: Tensor) -> Context:
        """The context together with pictures [b, 3, s, s] in [-1, 1], known where free [b, 1, s, s] is False.

        Raises Refused unless `config.inpaint`. With all of it free the context means what it meant before.
        """
        if not self.config.inpaint:
            raise Refused("this decoder has no channels for what is known of a picture (inpaint)")
        seen = [torch.where(free, torch.zeros_like(picture), picture), (~free).to(picture.dtype)]
        return context._replace(known=torch.cat(seen, 1))

    def forward(self, x: Tensor, t: Tensor, context: Context) -> Tensor:
        """x [b, 3, s, s] noised pictures in [-1, 1], t [b] → the network's output [b, 3 or 6, s, s]."""
        known = context.known if isinstance(context.known, Tensor) else None
        return self.unet(x, t, context.addend, context.keys_values, context.mask, known)

    def predict(self, output: Tensor, x: Tensor, t: Tensor) -> Prediction:
        """Read the network's output at noised x."""
        return self.schedule.predict(self.config.prediction, output, x, t, learned_range=self.config.learned_range)

    def denoise(self, x: Tensor, t: Tensor, context: Context) -> Prediction:
        """The network as samplers and guidance want it."""
        return self.predict(self(x, t, context), x, t)
