"""Which objective a job has."""

from __future__ import annotations

from typing import Any, cast

import torch

from infra.store import Store
from training.job import Job
from training.objectives.base import Objective
from training.objectives.prior import AutoregressivePriorObjective, PriorObjective
from training.objectives.upsampler import UpsamplerObjective


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
