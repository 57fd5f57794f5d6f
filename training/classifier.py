"""What a noised classifier learns: a row's labels from its picture at any noise (Dhariwal & Nichol 2021, section 4)."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from infra.store import Store
from training.data import Batch, Data, Reads, picture, read_rows
from training.job import Job
from training.labels import MISSING, Labels, class_table
from training.objectives import Losses, Noised, to_unit
from training.parallel import Group
from unclip.classifier import Classifier, ClassifierConfig


class ClassifierObjective(Noised):
    """Cross-entropy of each label, in nats, at uniformly drawn timesteps; summed over a row's labels.

    Rows without any label are not read. The tables of classes are those of the rows that are trained on: they are
    taken from the data as the fit starts, and belong to the model from then on.
    """

    config: ClassifierConfig

    def __init__(self, job: Job, store: Store, device: torch.device) -> None:
        super().__init__(job)
        columns = self.config.labels
        kept = Data(store, job.data["rows"], job.data["selection"], Reads(labels=Labels(columns))).places
        uids = (
            (place.index, read_rows(store, place.parquet, place.first, place.rows, ["uid"])["uid"].take(place.keep))
            for place in kept
        )
        self.config = self.config.fitted(class_table(store, ((index, u.to_pylist()) for index, u in uids), columns))
        self.facts["classes"] = dict(zip(columns, self.config.counts, strict=True))
        labels = Labels(columns, self.config.classes)
        self.reads = Reads(image=partial(picture, size=self.config.size), labels=labels)

    def build(self) -> nn.Module:
        return Classifier(self.config)

    def loss(self, model: nn.Module, batch: Batch, group: Group) -> Losses:
        classifier, rows = cast(Classifier, model), batch.tensors
        x0 = to_unit(rows["image"])
        t, noise = self._noise(classifier.schedule, x0, batch)
        logits = classifier(classifier.schedule.q_sample(x0, noise, t), t)
        each = [
            F.cross_entropy(of_label, right, reduction="none", ignore_index=MISSING)
            for of_label, right in zip(logits, rows["labels"].T, strict=True)
        ]
        return Losses(torch.stack(each).sum(0), t / len(classifier.schedule))
