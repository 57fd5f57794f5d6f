"""Which objective a job has: the one that its kind's row in `training.options.KINDS` names."""

from __future__ import annotations

from typing import cast

import torch

from infra.store import Store
from training.job import Job
from training.objectives.base import Objective
from training.options import KINDS, named


def objective(job: Job, store: Store, device: torch.device) -> Objective:
    """The objective of a job, with the CLIP and the statistics that it names."""
    return cast(Objective, named(KINDS[job.kind].objective)(job, store, device))
