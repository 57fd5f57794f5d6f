"""What a model learns: the rows it reads, the network, and its loss on a micro-batch. What all kinds share.

Each kind has a file of its own beside this one. An objective is the whole difference between fits; the loop
knows no kind of model. Randomness comes from the micro-batch's own generator, drawn on the CPU, so that a sample's
noise depends on neither device nor worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from infra.errors import Refused
from infra.records import Manifest, materialised, object_name
from infra.store import Store
from training.data import Batch, Reads, ReadText
from training.job import Job
from training.options import KINDS
from training.parallel import Group
from training.warm_start import warm_started
from unclip.clip import clip_widths
from unclip.diffusion import Schedule, hybrid_loss, loss_weights, simple_loss
from unclip.files import CONFIG, read_json, read_tensors, write_json
from unclip.models import AutoregressivePrior, Decoder, DiffusionPrior
from unclip.release import config_from, save_model

if TYPE_CHECKING:
    from unclip.clip import Clip


class Losses(NamedTuple):
    """Loss of each sample [b], and where in the process it was measured, [b] in [0, 1), if there is such a place."""

    loss: Tensor
    place: Tensor | None = None


class Objective(Protocol):
    """What one kind of model learns."""

    reads: Reads
    facts: dict[str, Any]
    """What the record should say beside counts."""

    @property
    def whole_batch(self) -> bool:
        """True if the loss needs the whole batch at once: then a worker's micro-batches come joined."""
        ...

    def build(self) -> nn.Module:
        """The network at its start, on the CPU; random numbers from torch's global generator."""
        ...

    @property
    def read_text(self) -> ReadText | None:
        """How this fit reads captions, a block at a time; None where it does not."""
        ...

    def loss(self, model: nn.Module, batch: Batch, group: Group) -> Losses:
        """Loss of each sample of the batch."""
        ...

    def save(self, out: Path, state: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, Any]:
        """Writes the finished model from a state dict, as a release wants it; returns more facts for its record."""
        ...


class Model:
    """What all models but CLIP share."""

    read_text: ReadText | None = None

    def __init__(self, job: Job, store: Store) -> None:
        self.job, self.store = job, store
        self.config = config_from(job.kind, job.model, job.stage)
        self.options: Any = job.config
        self.facts: dict[str, Any] = {}

    @property
    def whole_batch(self) -> bool:
        """As its kind's row in `training.options.KINDS` says."""
        return KINDS[self.job.kind].whole_batch

    def started(self, model: nn.Module) -> nn.Module:
        """The new model, with the weights of a finished one where the job goes on from one."""
        return warm_started(model, self.job, self.store, self.facts.get("clip"))

    def save(self, out: Path, state: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, Any]:
        save_model(out, self.job.kind, self.config, state, clip=self.facts.get("clip"))
        document = read_json(out / CONFIG, self.job.kind)
        document |= {"train": self.job.train, "facts": facts}
        write_json(out / CONFIG, document)
        return {}

    def _drop(self, batch: Batch, fraction: float, device: torch.device) -> Tensor:
        """bool [b], True for the fraction of samples that lose a condition."""
        return (torch.rand(len(batch), generator=batch.generator) < fraction).to(device)


class Noised(Model):
    """What all share that see noised samples."""

    def _noise(self, schedule: Schedule, x0: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(t [b], noise like x0) of this batch, each micro-batch's from its own generator."""
        drawn = [self._drawn(generator, len(schedule), (count, *x0.shape[1:])) for generator, count in batch.generators]
        t, noise = (torch.cat(column) for column in zip(*drawn, strict=True))
        return t.to(x0.device), noise.to(x0.device)

    def _drawn(self, generator: torch.Generator, steps: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        if self.options.t_std:
            logit = self.options.t_mean + self.options.t_std * torch.randn(shape[0], generator=generator)
            t = (logit.sigmoid() * steps).long().clamp(max=steps - 1)
        else:
            t = torch.randint(steps, shape[:1], generator=generator)
        return t, torch.randn(shape, generator=generator)


class Diffusion(Noised):
    """What the three diffusion models share."""

    def _loss(self, schedule: Schedule, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Losses:
        kind = self.config.prediction
        weight = loss_weights(schedule, t, kind, self.options.weighting, self.options.snr_cap)
        learned = getattr(self.config, "learned_range", False)
        loss = (hybrid_loss if learned else simple_loss)(schedule, output.float(), x0, noise, t, kind, weight)
        return Losses(loss, t / len(schedule))


class Conditioned(Model):
    """A model that sees CLIP's embeddings and token states."""

    def __init__(self, job: Job, store: Store, device: torch.device) -> None:
        super().__init__(job, store)
        self.clip = read_clip(store, job.data["clip"]).to(device)
        self.reads_tokens = getattr(self.config, "text", "clip") == "own"
        self.read_text = partial(read_tokens if self.reads_tokens else read_text, self.clip)
        self.facts = {"clip": self.clip.fingerprint}
        found, names = clip_widths(self.clip.config), ["embedding", "text_width", "context"]
        for name in [*names, "vocabulary"] if self.reads_tokens else names:
            if (said := getattr(self.config, name)) != found[name]:
                raise Refused(f"{job.stage} is made for a CLIP of {name} {said}, and this CLIP has {found[name]}")
        record = Manifest.load(store, job.data["statistics"]).only
        self.statistics = read_tensors(store.local(object_name(record.sha("statistics.safetensors"))))

    @torch.no_grad()
    def _furnish(self, model: DiffusionPrior | AutoregressivePrior | Decoder) -> nn.Module:
        """Statistics and CLIP's empty text belong to the model from its start."""
        if isinstance(model, AutoregressivePrior):
            model.pca.set(*(self.statistics[name] for name in ("image_mean", "pca", "eigenvalues")))
        elif not isinstance(model, Decoder) or model.config.image:
            model.mean.copy_(self.statistics["image_mean"])
            model.std.copy_(self.statistics["image_std"])
        empty = (self.clip.tokenize([""]),) if self.reads_tokens else self.clip.encode_text([""])
        model.null_text.set(*(part[0].cpu() for part in empty))
        return model


def read_text(clip: Clip, captions: Sequence[str]) -> dict[str, Tensor]:
    """The frozen text tower's view of captions, on the host, 64 at a time."""
    parts = [clip.encode_text(captions[start : start + 64]) for start in range(0, len(captions), 64)]
    embedding, states, mask = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return {"text_embedding": embedding, "text_states": states, "text_mask": mask}


def read_tokens(clip: Clip, captions: Sequence[str]) -> dict[str, Tensor]:
    """Captions as CLIP's tokeniser cuts them, for a model with a text transformer of its own."""
    return {"tokens": clip.tokenize(captions)}


def read_clip(store: Store, version: str) -> Clip:
    """The CLIP of a manifest."""
    from unclip.clip import Clip

    with materialised(store, version) as folder:
        return Clip.load(folder)
