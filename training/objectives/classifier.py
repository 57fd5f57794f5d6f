"""What a noised classifier learns: a row's labels from its picture at any noise (Dhariwal & Nichol 2021, section 4)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from infra.records import columns
from infra.store import Store
from training.data import MISSING, Batch, BlockRef, Labels, Reads, block_refs, class_table, picture
from training.job import Job
from training.objectives.base import Losses, Noised
from training.parallel import Group
from training.warm_start import inherit_fields
from unclip.models import Classifier, ClassifierConfig
from unclip.pictures import to_unit


class ClassifierObjective(Noised):
    """Cross-entropy of each label, in nats, at uniformly drawn timesteps; summed over a row's labels.

    Rows without any label are not read. The tables of classes are those of the rows that are trained on: they are
    taken from the data as the fit starts, and belong to the model from then on: one that goes on from it on other data
    learns nothing of values that it does not know.
    """

    config: ClassifierConfig

    def __init__(self, job: Job, store: Store, device: torch.device) -> None:
        super().__init__(job, store)
        names = self.config.labels
        self.config = inherit_fields(job, store, self.config, "classes")
        if not self.config.classes:
            blocks = block_refs(store, job.data["rows"], job.data["selection"], Labels(names))
            self.config = self.config.fitted(class_table(store, _kept(store, blocks), names))
        self.facts["classes"] = dict(zip(names, self.config.counts, strict=True))
        labels = Labels(names, self.config.classes)
        self.reads = Reads(image=partial(picture, size=self.config.size), labels=labels)

    def build(self) -> nn.Module:
        return self.started(Classifier(self.config))

    def loss(self, model: nn.Module, batch: Batch, group: Group) -> Losses:
        classifier, rows = cast(Classifier, model), batch.tensors
        x0 = to_unit(rows["image"])
        t, noise = self._noise(classifier.schedule, x0, batch)
        logits = classifier(classifier.schedule.q_sample(x0, noise, t), t)
        each = [
            F.cross_entropy(of_label.float(), right, reduction="none", ignore_index=MISSING)
            for of_label, right in zip(logits, rows["labels"].T, strict=True)
        ]
        return Losses(torch.stack(each).sum(0), t / len(classifier.schedule))


def _kept(store: Store, blocks: Iterable[BlockRef]) -> Iterator[tuple[str, list[bytes]]]:
    """(index object, uids of the kept rows) of each shard."""
    for (parquet, index), shard in groupby(blocks, key=lambda place: (place.parquet, place.index)):
        uids = columns(store, parquet, ["uid"])["uid"]
        yield index, uids.take(np.concatenate([block.first + block.keep for block in shard])).to_pylist()
