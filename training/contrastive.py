"""What CLIP learns: to tell each picture's caption from those of all other pictures of the batch (arXiv 2103.00020)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data import Batch, Reads, decode
from training.job import ClipTrain, Job
from training.objectives import Losses
from training.parallel import Group
from unclip.clip import Clip, Preprocess, build, check
from unclip.tokenizer import CLIP_VOCABULARY, Tokenizer


class ClipObjective:
    """The symmetric contrastive loss over the whole batch, gathered from all workers."""

    whole_batch = True

    def __init__(self, job: Job) -> None:
        check(job.model)
        self.job = job
        self.options = cast(ClipTrain, job.config)
        self.facts: dict[str, Any] = {}
        side, text = job.model["vision_cfg"].get("image_size", 224), job.model["text_cfg"]
        self.preprocess = Preprocess(side if isinstance(side, int) else side[0])
        self.tokenizer = Tokenizer(text.get("context_length", 77), text.get("vocab_size", CLIP_VOCABULARY))
        self.reads = Reads(image=self._decode, originals=True, text=True)

    def build(self) -> nn.Module:
        return build(self.job.model)

    def read_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions as tokens [n, L]."""
        return {"tokens": self.tokenizer(captions)}

    def loss(self, model: nn.Module, batch: Batch, group: Group) -> Losses:
        """Each rank answers for its own rows and columns of the batch's table of similarities, so that sums over ranks
        are the loss and the gradient of the whole batch."""
        network = cast(Any, model)
        images = network.encode_image(self.preprocess(batch.tensors["image"]), normalize=True)
        texts = network.encode_text(batch.tensors["tokens"], normalize=True)
        scale = network.logit_scale.clamp(max=math.log(self.options.max_scale)).exp()
        right = torch.arange(len(images), device=images.device) + group.rank * len(images)
        by_image = F.cross_entropy(scale * images @ group.gather(texts).T, right, reduction="none")
        by_text = F.cross_entropy(scale * texts @ group.gather(images).T, right, reduction="none")
        return Losses((by_image + by_text) / 2)

    def save(self, out: Path, state: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, Any]:
        clip = Clip(self.job.model, {name: tensor.cpu() for name, tensor in state.items()}, self.preprocess)
        clip.save(out)
        return {"fingerprint": clip.fingerprint}

    def _decode(self, data: bytes, uid: bytes) -> np.ndarray:
        """A picture resized as the finished CLIP will resize it, in 8 bits."""
        plain = Preprocess(self.preprocess.size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        return (plain(torch.from_numpy(decode(data))[None])[0] * 255).round().to(torch.uint8).numpy()
