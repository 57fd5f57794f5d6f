"""What a model learns: the rows it reads, the network, and its loss on a micro-batch; here of priors and upsamplers.

Decoders have theirs in decoders.py, CLIP in contrastive.py. An objective is the whole difference between fits; the loop
knows no kind of model. Randomness comes from the micro-batch's own generator, drawn on the CPU, so that a sample's
noise depends on neither device nor worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.errors import Refused
from infra.records.manifest import Manifest
from infra.records.objects import object_name
from infra.records.parquet import RowGroups
from infra.store.base import Store
from training.data.batches import Batch, Reads, ReadText, picture
from training.data.blocks import matrix, places
from training.data.order import derived
from training.job import AutoregressivePriorTrain, Job, PriorTrain, UpsamplerTrain
from training.optim.precision import in_float32
from training.parallel.flat import Group
from training.reading import unpacked
from training.warm_start import configured, started
from unclip.clip.model import clip_widths
from unclip.degrade.bsr import FULL, LIGHT, bsr, gaussian_blur
from unclip.diffusion.losses import hybrid_loss, simple_loss, weights
from unclip.diffusion.schedule import Schedule
from unclip.files import CONFIG, read_json, read_tensors, write_json
from unclip.models.ar_prior import AutoregressivePrior
from unclip.models.decoder import Decoder
from unclip.models.prior import DiffusionPrior
from unclip.models.upsampler import Upsampler
from unclip.pictures import to_unit
from unclip.release.model import config_from, save_model

if TYPE_CHECKING:
    from unclip.clip.model import Clip


DOTS = 1 << 14
"""Rows that are enough to bound 1024 buckets of equal frequency."""


class Losses(NamedTuple):
    """Loss of each sample [b], and where in the process it was measured, [b] in [0, 1), if there is such a place."""

    loss: Tensor
    place: Tensor | None = None


class Objective(Protocol):
    """What one kind of model learns."""

    reads: Reads
    whole_batch: bool
    """True if the loss needs the whole batch at once: then a worker's micro-batches come joined."""
    facts: dict[str, Any]
    """What the record should say beside counts."""

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


def objective(job: Job, store: Store, device: torch.device) -> Objective:
    """The objective of a job, with the CLIP and the statistics that it names."""
    if job.kind == "clip":
        from training.objectives.clip import ClipObjective

        return ClipObjective(job, store)
    from training.objectives.decoder import DecoderObjective, InpainterObjective

    kinds: dict[str, type[Any]] = {
        "prior": PriorObjective,
        "ar_prior": AutoregressivePriorObjective,
        "decoder": DecoderObjective,
        "inpainter": InpainterObjective,
        "upsampler": UpsamplerObjective,
    }
    if job.kind == "classifier":
        from training.objectives.classifier import ClassifierObjective

        kinds["classifier"] = ClassifierObjective
    elif job.kind == "noised_clip":
        from training.objectives.clip import NoisedClipObjective

        kinds["noised_clip"] = NoisedClipObjective
    return cast(Objective, kinds[job.kind](job, store, device))


class Model:
    """What all models but CLIP share."""

    whole_batch = False
    read_text: ReadText | None = None

    def __init__(self, job: Job, store: Store) -> None:
        self.job, self.store = job, store
        self.config = config_from(job.kind, job.model, job.stage)
        self.options: Any = job.config
        self.facts: dict[str, Any] = {}

    def started(self, model: nn.Module) -> nn.Module:
        """The new model, with the weights of a finished one where the job goes on from one."""
        return started(model, self.job, self.store, self.facts.get("clip"))

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
        weight = weights(schedule, t, kind, self.options.weighting, self.options.snr_cap)
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


class PriorObjective(Conditioned, Diffusion):
    """Clean z_i from noised z_i and a caption (section 2.2); standardised embeddings."""

    reads = Reads(embeddings=True, text=True)

    def build(self) -> nn.Module:
        return self.started(self._furnish(DiffusionPrior(self.config)))

    def loss(self, model: nn.Module, batch: Batch, group: Group) -> Losses:
        prior, options, rows = cast(DiffusionPrior, model), cast(PriorTrain, self.options), batch.tensors
        x0 = prior.standardise(rows["image_embedding"])
        t, noise = self._noise(prior.schedule, x0, batch)
        drop = self._drop(batch, options.drop_text, x0.device)
        context = prior.context(rows["text_embedding"], rows["text_states"], rows["text_mask"], drop)
        output = prior(prior.schedule.q_sample(x0, noise, t), t, *context)
        return self._loss(prior.schedule, output, x0, noise, t)


class AutoregressivePriorObjective(Conditioned):
    """The buckets of z_i, one after the other, from a caption (section 2.2); cross-entropy a token, in nats."""

    reads = Reads(embeddings=True, text=True)

    def __init__(self, job: Job, store: Store, device: torch.device) -> None:
        super().__init__(job, store, device)
        self.config = configured(job, store, self.config, "components").fitted(self.statistics["eigenvalues"])
        self.facts["components"] = self.config.kept

    def build(self) -> nn.Module:
        prior = AutoregressivePrior(self.config)
        prior.set_dots(sample_dots(self.store, self.job.data["rows"], self.job.data["selection"]))
        return self.started(self._furnish(prior))

    def loss(self, model: nn.Module, batch: Batch, group: Group) -> Losses:
        prior, options, rows = (
            cast(AutoregressivePrior, model),
            cast(AutoregressivePriorTrain, self.options),
            batch.tensors,
        )
        with in_float32(rows["image_embedding"].device):  # a bucket more or less is another target
            tokens = prior.tokenise(rows["image_embedding"], rows["text_embedding"])
        drop = self._drop(batch, options.drop_text, tokens.device)
        context = prior.context(rows["text_embedding"], rows["text_states"], rows["text_mask"], drop)
        logits = prior(tokens[:, :-1], *context)
        return Losses(F.cross_entropy(logits.float().mT, tokens, reduction="none").mean(1))


class UpsamplerObjective(Diffusion):
    """Pictures given their low-resolution selves, corrupted a little (section 2.1); trained on crops."""

    def __init__(self, job: Job, store: Store, device: torch.device) -> None:
        super().__init__(job, store)
        self.reads = Reads(image=partial(picture, size=self.config.size), originals=True)
        options = cast(UpsamplerTrain, self.options)
        self.bsr = {"bsr": FULL, "bsr_light": LIGHT}.get(options.corruption)
        if self.bsr is not None:
            self.bsr = self.bsr.scaled(options.strength)
        self.config.check_crop(options.crop)

    def build(self) -> nn.Module:
        return self.started(Upsampler(self.config))

    def loss(self, model: nn.Module, batch: Batch, group: Group) -> Losses:
        upsampler, options = cast(Upsampler, model), cast(UpsamplerTrain, self.options)
        x0 = to_unit(batch.tensors["image"])
        with in_float32(x0.device):
            low = self._corrupted(F.avg_pool2d(x0, self.config.factor), batch)
        if options.crop is not None and options.crop < self.config.size:
            x0, low = self._cropped(x0, low, options.crop, batch)
        t, noise = self._noise(upsampler.schedule, x0, batch)
        output = upsampler(upsampler.schedule.q_sample(x0, noise, t), t, low)
        return self._loss(upsampler.schedule, output, x0, noise, t)

    def _corrupted(self, low: Tensor, batch: Batch) -> Tensor:
        """The condition as this fit spoils it; under BSR a sample's seed is made of the micro-batch's and its uid."""
        options = cast(UpsamplerTrain, self.options)
        if options.corruption == "blur" and options.blur:
            sigmas = options.blur * torch.rand(len(low), generator=batch.generator)
            return gaussian_blur(low, sigmas.to(low.device))
        if self.bsr is not None:
            return bsr(low, [derived("bsr", batch.seed, uid.hex()) for uid in batch.uids], self.bsr)
        return low

    def _cropped(self, x0: Tensor, low: Tensor, crop: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same random square of each picture in both resolutions, aligned to low-resolution pixels."""
        factor = self.config.factor
        side = crop // factor
        corners = torch.randint(low.shape[-1] - side + 1, (len(x0), 2), generator=batch.generator).tolist()
        high = [
            x[:, factor * y : factor * y + crop, factor * z : factor * z + crop]
            for x, (y, z) in zip(x0, corners, strict=True)
        ]
        small = [x[:, y : y + side, z : z + side] for x, (y, z) in zip(low, corners, strict=True)]
        return torch.stack(high), torch.stack(small)


def sample_dots(store: Store, rows: str, selection: str, least: int = DOTS) -> Tensor:
    """z_i·z_t of kept rows, float64 [n]: of all, or of blocks evenly apart that hold `least` or somewhat more."""
    columns = ("image_embedding", "text_embedding")
    blocks = [place for place in places(store, rows, selection) if len(place.keep)]
    apart = max(1, sum(len(place.keep) for place in blocks) // least)
    dots = []
    for place in blocks[::apart]:
        table = RowGroups(store, place.parquet).read(place.first, place.rows, ("uid", *columns))
        place.check(table["uid"])
        image, text = (torch.from_numpy(matrix(table[name])[place.keep]).double() for name in columns)
        dots.append((image * text).sum(1))
    return torch.cat(dots) if dots else torch.zeros(0, dtype=torch.float64)


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
    from unclip.clip.model import Clip

    with unpacked(store, version) as folder:
        return Clip.load(folder)
