"""A classifier of noised pictures, whose gradient guides the decoder (Dhariwal & Nichol 2021, section 4).

It answers for one or more label columns of the data, each with its own table of classes; columns are taken to be
independent given the picture, so that log p(shape, colour | x_t) is a sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from unclip.diffusion import LogProb, Schedule
from unclip.errors import Refused
from unclip.models.unet_encoder import HalfUNet, HalfUNetConfig


@dataclass(frozen=True)
class ClassifierConfig(HalfUNetConfig):
    """Shape and process of a classifier, and what it tells apart."""

    labels: tuple[str, ...] = ()
    """Names of the label columns."""
    classes: tuple[tuple[str, ...], ...] = ()
    """Classes of each label, in the order of its logits; empty as long as no data were seen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Out of JSON the tables come as lists.
        object.__setattr__(self, "classes", tuple(tuple(table) for table in self.classes))
        if len(set(self.labels)) != len(self.labels):
            raise Refused(f"classifier: a label stands twice in {', '.join(self.labels)}")
        if self.classes and len(self.classes) != len(self.labels):
            raise Refused(f"classifier: {len(self.labels)} labels with {len(self.classes)} tables of classes")
        for label, table in zip(self.labels, self.classes, strict=False):
            if len(table) < 2 or len(set(table)) != len(table):
                raise Refused(f"classifier: label {label!r} needs two classes or more, each once, not {len(table)}")

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of classes of each label."""
        return tuple(map(len, self.classes))

    def fitted(self, classes: tuple[tuple[str, ...], ...]) -> ClassifierConfig:
        """This configuration with the classes of each label that the data have."""
        return replace(self, classes=classes)

    def place(self, label: str, value: str) -> tuple[int, int]:
        """(which label, which of its classes); raises Refused, with what there is, for another."""
        if label not in self.labels:
            raise Refused(f"this classifier knows no label {label!r}; it was trained on {', '.join(self.labels)}")
        which = self.labels.index(label)
        if value not in self.classes[which]:
            known = ", ".join(self.classes[which][:20]) + (", …" if len(self.classes[which]) > 20 else "")
            raise Refused(f"label {label} has no class {value!r}; its classes: {known}")
        return which, self.classes[which].index(value)


class Classifier(nn.Module):
    """p(label | x_t, t) for each label."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = HalfUNet(config, sum(config.counts))

    @cached_property
    def schedule(self) -> Schedule:
        """The process whose pictures it reads."""
        return Schedule.named(self.config.schedule, self.config.timesteps)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Noised pictures x [b, 3, s, s], t [b] → logits [b, classes] of each label."""
        return self.encoder(x, t).split(self.config.counts, 1)

    def log_prob(self, wanted: Mapping[str, str]) -> LogProb:
        """(x_t, t) → log p(wanted | x_t) [b], for `classifier_guidance`; wanted: label → class, for all rows.

        Raises Refused for a label or a class that it does not know.
        """
        places = [self.config.place(label, value) for label, value in wanted.items()]

        def log_prob(x: Tensor, t: Tensor) -> Tensor:
            logits = self(x, t)
            return torch.stack([logits[which].log_softmax(1)[:, at] for which, at in places]).sum(0)

        return log_prob
