"""What CLIP and a noised CLIP learn: to tell each picture's caption from those of all other pictures of the batch
(arXiv 2103.00020)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.errors import Refused
from infra.records import Manifest, object_name
from infra.store import Store
from training.data import Batch, Reads, decode_image, picture
from training.job import START, Job
from training.objectives.base import Losses, Noised
from training.optim import in_float32
from training.options import KINDS, ClipTrain
from training.parallel import Group
from training.warm_start import finished_model
from unclip.clip import CLIP_VOCABULARY, Clip, Preprocess, Tokenizer, build_clip, check_clip, clip_widths
from unclip.diffusion import Schedule
from unclip.files import CONFIG, read_json
from unclip.models import MAX_SCALE, NoisedClip
from unclip.pictures import to_unit

SCHEDULE = Schedule.named("cosine")
"""Of `clip.train.noised`: CLIP comes before the decoder, whose schedule it cannot know."""


def contrastive(images: Tensor, texts: Tensor, scale: Tensor, group: Group) -> Tensor:
    """The symmetric contrastive loss [b] of unit vectors [b, d] over the whole batch, gathered from all workers.

    scale: the inverse temperature. Each rank answers for its own rows and columns of the batch's table of similarities,
    so that sums over ranks are the loss and the gradient of the whole batch.
    """
    right = torch.arange(len(images), device=images.device) + group.rank * len(images)
    with in_float32(images.device):
        images, texts = images.float(), texts.float()
        by_image = F.cross_entropy(scale * images @ group.gather(texts).T, right, reduction="none")
        by_text = F.cross_entropy(scale * texts @ group.gather(images).T, right, reduction="none")
    return (by_image + by_text) / 2


@torch.no_grad()
def bound_(logit_scale: nn.Parameter, most: float) -> None:
    """Puts the logarithm of an inverse temperature that a step has led beyond `most` back on its bound.

    A clamp in the forward pass alone would give it no gradient from there on, and hold it for good.
    """
    logit_scale.clamp_(max=math.log(most))


class ClipObjective:
    """Both towers of a CLIP, from the pictures of the tars and their captions."""

    whole_batch = KINDS["clip"].whole_batch

    def __init__(self, job: Job, store: Store | None = None, device: torch.device | None = None) -> None:
        check_clip(job.model)
        self.job = job
        self.options = cast(ClipTrain, job.config)
        self.facts: dict[str, Any] = {}
        side, text = job.model["vision_cfg"].get("image_size", 224), job.model["text_cfg"]
        self.preprocess = Preprocess(side if isinstance(side, int) else side[0])
        self.tokenizer = Tokenizer(text.get("context_length", 77), text.get("vocab_size", CLIP_VOCABULARY))
        self.start = self._started(store) if store is not None and START in job.data else None
        if self.start is not None:
            self.preprocess, self.tokenizer = self.start.preprocess, self.start.tokenizer
        self.reads = Reads(image=self._decode, originals=True, text=True)

    def build(self) -> nn.Module:
        model = build_clip(self.job.model)
        if self.start is not None:
            model.load_state_dict(self.start.state)
        return model

    def _started(self, store: Store) -> Clip:
        """The CLIP that the job goes on from; Refused for one of another architecture, or without an image tower."""
        with finished_model(self.job, store) as folder:
            clip = Clip.load(folder)
        asked = json.loads(json.dumps(self.job.model))
        if different := sorted(name for name in asked | clip.config if asked.get(name) != clip.config.get(name)):
            raise Refused(f"{self.job.stage}: the CLIP that it starts from has another {different[0]} than clip.model")
        if not any(name.startswith("visual.") for name in clip.state):
            raise Refused(f"{self.job.stage}: the CLIP that it starts from has no image tower")
        return clip

    def read_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions as tokens [n, L]."""
        return {"tokens": self.tokenizer(captions)}

    def loss(self, model: nn.Module, batch: Batch, group: Group) -> Losses:
        network = cast(Any, model)
        pictures = self._noised(batch) if self.options.noised else batch.tensors["image"]
        with in_float32(pictures.device):
            pictures = self.preprocess(pictures)
        images = network.encode_image(pictures, normalize=True)
        texts = network.encode_text(batch.tensors["tokens"], normalize=True)
        bound_(network.logit_scale, self.options.max_scale)
        return Losses(contrastive(images, texts, network.logit_scale.exp(), group))

    def _noised(self, batch: Batch) -> Tensor:
        """The batch's pictures, float in the scale of [0, 1], a share of them noised to a timestep of their own."""
        x0 = to_unit(batch.tensors["image"])
        drawn = [
            (
                torch.rand(count, generator=generator) < self.options.noised,
                torch.randint(len(SCHEDULE), (count,), generator=generator),
                torch.randn((count, *x0.shape[1:]), generator=generator),
            )
            for generator, count in batch.generators
        ]
        chosen, t, noise = (torch.cat(column).to(x0.device) for column in zip(*drawn, strict=True))
        return (torch.where(chosen[:, None, None, None], SCHEDULE.q_sample(x0, noise, t), x0) + 1) / 2

    def save(self, out: Path, state: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, Any]:
        weights = {name: tensor.cpu() for name, tensor in state.items()}
        clip = Clip(self.job.model, weights, self.preprocess, self.tokenizer.merges)
        clip.save(out)
        return {"fingerprint": clip.fingerprint}

    def _decode(self, data: bytes, uid: bytes) -> np.ndarray:
        """A picture resized as the finished CLIP will resize it, in 8 bits."""
        plain = Preprocess(self.preprocess.size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        return (plain(torch.from_numpy(decode_image(data))[None])[0] * 255).round().to(torch.uint8).numpy()


class NoisedClipObjective(Noised):
    """An image encoder of noised base pictures against the text embeddings that CLIP has given (GLIDE, section 2.3)."""

    def __init__(self, job: Job, store: Store, device: torch.device) -> None:
        super().__init__(job, store)
        self.reads = Reads(image=partial(picture, size=self.config.size), text_embeddings=True)
        clip = store.local(object_name(Manifest.load(store, job.data["clip"]).only.sha(CONFIG)))
        document = read_json(clip, "CLIP")
        if (width := clip_widths(document["model"])["embedding"]) != self.config.embedding:
            raise Refused(
                f"{job.stage} is made for embeddings of {self.config.embedding}, and this CLIP's have {width}"
            )
        self.facts = {"clip": document["fingerprint"]}

    def build(self) -> nn.Module:
        return self.started(NoisedClip(self.config))

    def loss(self, model: nn.Module, batch: Batch, group: Group) -> Losses:
        clip = cast(NoisedClip, model)
        x0 = to_unit(batch.tensors["image"])
        t, noise = self._noise(clip.schedule, x0, batch)
        images = F.normalize(clip(clip.schedule.q_sample(x0, noise, t), t), dim=1)
        texts = F.normalize(batch.tensors["text_embedding"], dim=1)
        bound_(clip.logit_scale, MAX_SCALE)
        return Losses(contrastive(images, texts, clip.scale, group), t / len(clip.schedule))
