"""An objective and its network as one module, whole or cut over the workers."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn

from infra.errors import Refused
from training.data import Batch
from training.job import FitHow, Job
from training.meta import shapes
from training.objectives import Losses, Objective
from training.options import TrainConfig
from training.parallel import STATE_BYTES, Group

SHARE = 0.6
"""Part of a device's memory that a flat model's state may take, before `auto` shards; the rest is for activations."""


def is_sharded(
    how: FitHow, config: TrainConfig, *, whole_batch: bool, parameters: int, ranks: int, room: float
) -> bool:
    """Whether a fit keeps its model in shards: as `how.shard` says, or, for `auto`, where one GPU is too small for it.

    whole_batch: the objective's; room: bytes of a worker's GPU, infinite without one. Raises Refused for what cannot be
    sharded and was asked to be.
    """
    if how.shard == "flat" or ranks == 1:
        return False
    why = ""
    if config.muon:
        why = "train.muon multiplies whole matrices, of which a rank would have a part"
    elif whole_batch:
        why = "a contrastive model bounds its temperature, a single number, in place"
    if how.shard == "fsdp" and why:
        raise Refused(f"shard is fsdp, and {why}. Leave shard at auto or flat, or train.muon at 0.")
    if how.shard == "fsdp":
        return True
    return not why and parameters * STATE_BYTES > SHARE * room


def gpu_bytes(device: torch.device) -> float:
    """Bytes of a GPU's memory; a CPU's is not bounded here."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


class LossModule(nn.Module):
    """A model and what it learns, in one call: so that all that touches a parameter happens inside one forward pass."""

    def __init__(self, model: nn.Module, task: Objective, group: Group) -> None:
        super().__init__()
        self.model, self.task, self.group = model, task, group

    def forward(self, batch: Batch) -> Losses:
        """The losses of a micro-batch."""
        return self.task.loss(self.model, batch, self.group)


def build_model(job: Job, task: Objective, how: FitHow, group: Group, device: torch.device) -> tuple[nn.Module, bool]:
    """(the objective's model at its start, on the host; whether it is to be sharded).

    One that is to be sharded has weights on rank 0 alone, and shapes on the others. Raises Refused as `is_sharded`.
    """
    here, sharded = gpu_bytes(device), False
    if how.shard == "fsdp" or (how.shard == "auto" and group.ranks > 1 and math.isfinite(here)):
        without = nn.Module() if task.whole_batch else shapes(job.kind, cast(Any, task).config)
        size = sum(parameter.numel() for parameter in without.parameters())
        sharded = is_sharded(
            how, job.config, whole_batch=task.whole_batch, parameters=size, ranks=group.ranks, room=here
        )
    torch.manual_seed(job.config.seed)
    return (without if sharded and group.rank else task.build()), sharded
