"""What the decoder learns, and the inpainter, which is a decoder that goes on learning to fill in."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from infra.store import Store
from training.data import Batch, Reads, picture
from training.job import Job
from training.objectives.base import Conditioned, Diffusion, Losses
from training.objectives.masks import random_masks
from training.options import DecoderTrain, InpainterTrain
from training.parallel import Group
from unclip.models import Context, Decoder
from unclip.pictures import to_unit


class DecoderObjective(Conditioned, Diffusion):
    """Pictures given z_i (if the decoder takes it) and the caption, each dropped on its own (section 2.1)."""

    def __init__(self, job: Job, store: Store, device: torch.device) -> None:
        super().__init__(job, store, device)
        image = partial(picture, size=self.config.size)
        self.reads = Reads(image=image, embeddings=self.config.image, text=True)

    def build(self) -> nn.Module:
        return self.started(self._furnish(Decoder(self.config)))

    def loss(self, model: nn.Module, batch: Batch, group: Group) -> Losses:
        decoder = cast(Decoder, model)
        x0 = to_unit(batch.tensors["image"])
        t, noise = self._noise(decoder.schedule, x0, batch)
        context = self._told(decoder, self._context(decoder, batch), x0, batch)
        output = decoder(decoder.schedule.q_sample(x0, noise, t), t, context)
        return self._loss(decoder.schedule, output, x0, noise, t)

    def _context(self, decoder: Decoder, batch: Batch) -> Context:
        """z_i and captions, a part of each dropped."""
        options, rows = cast(DecoderTrain, self.options), batch.tensors
        image = rows.get("image_embedding")
        device = rows["image"].device
        drop_image = self._drop(batch, options.drop_image, device) if image is not None else None
        drop_text = self._drop(batch, options.drop_text, device)
        return decoder.context(image, *self.caption(batch), drop_image=drop_image, drop_text=drop_text)

    def caption(self, batch: Batch) -> tuple[Tensor, ...]:
        """The captions as the decoder takes them: see `Decoder.context`."""
        names = ("tokens",) if self.reads_tokens else ("text_embedding", "text_states", "text_mask")
        return tuple(batch.tensors[name] for name in names)

    def _told(self, decoder: Decoder, context: Context, x0: Tensor, batch: Batch) -> Context:
        """What else the decoder is told: nothing."""
        return context


class InpainterObjective(DecoderObjective):
    """The same of pictures of which a part is known (GLIDE, section 2.4), on from a finished decoder.

    z_i is the whole picture's, as a prior would make it of a prompt. The loss is over the whole picture, as GLIDE's.
    """

    def build(self) -> nn.Module:
        return self.started(Decoder(self.config))

    def _told(self, decoder: Decoder, context: Context, x0: Tensor, batch: Batch) -> Context:
        free = random_masks(len(x0), x0.shape[-1], batch.generator).to(x0.device)
        nothing = self._drop(batch, cast(InpainterTrain, self.options).drop_known, x0.device)
        return decoder.knowing(context, x0, free | nothing[:, None, None, None])
