"""What the two priors learn (arXiv 2204.06125, section 2.2)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.records import RowGroups
from infra.store import Store
from training.data import Batch, Reads, as_matrix, block_refs
from training.job import Job
from training.objectives.base import Conditioned, Diffusion, Losses
from training.optim import in_float32
from training.options import AutoregressivePriorTrain, PriorTrain
from training.parallel import Group
from training.warm_start import inherit_fields
from unclip.models import AutoregressivePrior, DiffusionPrior

DOTS = 1 << 14
"""Rows that are enough to bound 1024 buckets of equal frequency."""


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
        self.config = inherit_fields(job, store, self.config, "components").fitted(self.statistics["eigenvalues"])
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


def sample_dots(store: Store, rows: str, selection: str, least: int = DOTS) -> Tensor:
    """z_i·z_t of kept rows, float64 [n]: of all, or of blocks evenly apart that hold `least` or somewhat more."""
    columns = ("image_embedding", "text_embedding")
    blocks = [place for place in block_refs(store, rows, selection) if len(place.keep)]
    apart = max(1, sum(len(place.keep) for place in blocks) // least)
    dots = []
    for place in blocks[::apart]:
        table = RowGroups(store, place.parquet).read(place.first, place.rows, ("uid", *columns))
        place.check(table["uid"])
        image, text = (torch.from_numpy(as_matrix(table[name])[place.keep]).double() for name in columns)
        dots.append((image * text).sum(1))
    return torch.cat(dots) if dots else torch.zeros(0, dtype=torch.float64)
