"""Rows held out of training, and the loss that a finished model's averages have on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from infra.errors import Refused
from infra.store import Store
from training.data import Batch, Data, derive_seed
from training.job import Job
from training.learner import LossModule
from training.optim import Averages, Precision
from training.options import TrainConfig
from training.parallel import scatter_state


@dataclass(frozen=True)
class HeldOut:
    """Tells the rows that are held out from the others, by uid: digests, so that a share of them is any share of rows.

    A row is held out or not whatever other rows there are, in every fit of the same share.
    """

    share: float
    held: bool
    """Whether the rows that are held out are wanted, or the others."""

    def __call__(self, uids: pa.Array) -> np.ndarray:
        """bool [n] of uids [n], each 16 bytes: True for those that are wanted."""
        numbers = np.frombuffer(b"".join(uids.to_pylist()), dtype=">u8")[1::2]
        return (numbers < self.share * 2**64) == self.held


def split_held_out(data: Data, config: TrainConfig) -> tuple[Data, Data | None]:
    """The rows to train on, and those held out: about `ema_validation`, where there are averages to choose among.

    Raises Refused where that is more than half of all rows, or happens to be none.
    """
    if len(config.ema_lengths) < 2:
        return data, None
    rows, wanted = sum(data.counts), config.ema_validation
    if 2 * wanted > rows:
        raise Refused(
            f"train.ema_validation asks for {wanted} of {rows} rows to choose an average by; hold out at most half"
        )
    train, held = (data.where(HeldOut(wanted / rows, each)) for each in (False, True))
    if not any(held.counts):
        raise Refused(f"train.ema_validation is {wanted}, and no row of {rows} is held out by it; ask for more")
    return train, held


def batches(held: Data, config: TrainConfig) -> Iterator[Batch]:
    """The held-out rows, at most `ema_validation`, in micro-batches of fixed noise, timesteps and drops."""
    rows = [(block, row) for block, count in enumerate(held.counts) for row in range(count)][: config.ema_validation]
    for first in range(0, len(rows), config.micro_size):
        yield held.batch(rows[first : first + config.micro_size], derive_seed("validation", config.seed, first))


@torch.no_grad()
def mean_loss(learner: LossModule, shown: Iterator[Batch], precision: Precision) -> float:
    """The objective's own loss, a sample, of a model in evaluation mode; every rank of a sharded one calls it."""
    device = next(learner.parameters()).device
    total, count = 0.0, 0
    learner.eval()
    for batch in shown:
        with precision.autocast():
            losses = learner(batch.to(device)).loss
        total, count = total + float(losses.double().sum()), count + len(losses)
    return total / count


def choose_average(
    learner: LossModule,
    averages: Averages,
    base: dict[str, Tensor],
    held: Data | None,
    job: Job,
    store: Store,
    precision: Precision,
    *,
    sharded: bool,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict of the average to release, what the record says of it): of `ema_lengths` the one whose loss on the
    held-out rows is least, of equals the first; where only one is named, that one.

    base: a state dict of the model, for what has no average. Every rank of a sharded model calls it, and all see the
    same rows; base is empty but on rank 0, which reads the snapshots and whose answer counts. The model's own weights
    are overwritten. A loss that is not finite is never the least one.
    """
    config, told = job.config, []
    least, chosen = float("inf"), dict[str, Tensor]()
    for length in config.ema_lengths:
        state, missed = dict[str, Tensor](), 0.0
        if base:
            average, missed = averages.reconstructed(store, job.key, length)
            state = {name: average.get(name, tensor).to(tensor) for name, tensor in base.items()}
        entry: dict[str, Any] = {"length": length, "missed": missed}
        if held is not None:
            if sharded:
                scatter_state(learner, state)
            else:
                learner.model.load_state_dict(state)
            loss = mean_loss(learner, batches(held, config), precision)
            entry["loss"] = loss if np.isfinite(loss) else None
        told.append(entry)
        if not chosen or (entry.get("loss") is not None and entry["loss"] < least):
            least, chosen = entry.get("loss") or least, {name: tensor.clone() for name, tensor in state.items()}
            released = length
    facts: dict[str, Any] = {"released": released, "candidates": told, "snapshots": len(averages.snapshots)}
    if held is not None:
        facts["rows"] = min(sum(held.counts), config.ema_validation)
    return chosen, {"averages": facts}
