"""What a fit has reached: weights, moments and averages, kept in checkpoints and gone back to."""

from __future__ import annotations

import logging
import math
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import Refused
from infra.store import Store, with_retries
from training.checkpoint import RELEASE, Checkpoint, Checkpoints, Saver, explain_full_disk
from training.data import Data
from training.job import Job
from training.learner import LossModule
from training.optim import Averages, Diverged, Ema, Optimiser, Precision, Spikes, is_inner
from training.options import TrainConfig
from training.parallel import Flat, Group, Vectors, gather_state
from training.telemetry import SUMS
from training.validate import choose_average

EXTRA = 3 + SUMS
"""What the ranks agree on with each gradient: whether any was asked to stop, whether rank 0 finds a save due, the
batch's mean loss; and behind these, what the clock tells of the losses."""


MAX_RETURNS = 3
"""Returns to one and the same state; after that training has diverged."""


ALONE = Group()


log = logging.getLogger(__name__)


class State:
    """All that a run is: the model, the optimiser, the moving average, and how many steps were done.

    vectors: what this rank has of the model where it is sharded; default the whole.
    """

    def __init__(
        self, config: TrainConfig, model: nn.Module, vectors: Vectors | None = None, group: Group = ALONE
    ) -> None:
        self.config, self.model = config, model
        self.flat = vectors or Flat(model, extra=EXTRA, inner=is_inner if config.muon else None)
        self.optimiser = Optimiser(self.flat, config, group)
        self.ema = Ema(model, self.flat, config.ema, config.ema_ramp)
        self.averages = Averages(model, self.flat, config)
        self.precision = Precision(config.precision, self.flat.weights.device)
        self.spikes = Spikes(config)
        self.step = 0
        self.anchor = 0
        """Samples of the checkpoint that a run returns to after too many bad steps; 0: there is none."""

    @property
    def samples(self) -> int:
        """Samples seen by all workers together."""
        return self.step * self.config.batch

    def update(self, lr: float) -> float:
        """One step on the gradient that stands in `flat`; returns its norm."""
        updates, loss = self.optimiser.updates, float(self.flat.extra[LOSS]) if self.spikes.on else 0.0
        self.precision.unscale_(self.flat.gradient)
        norm = self.optimiser.step(lr, lambda norm: self.spikes.is_spike(loss, norm))
        finite, taken = math.isfinite(norm), self.optimiser.updates > updates
        self.spikes.note(loss, norm, taken=taken, counts=finite or not self.precision.overflows)
        self.precision.update(finite=finite)
        if taken:
            self.ema.update(self.optimiser.updates)
            self.averages.update(self.optimiser.updates)
        self.step += 1
        return norm

    def renew_anchor(self) -> bool:
        """Makes this state the one to return to, where one is due; whether it has to be saved for that."""
        due = self.spikes.anchor_due(self.step)
        if due:
            self.anchor = self.samples
            self.spikes.returns = 0
        return due

    @property
    def counters(self) -> dict[str, int]:
        """Steps that were not taken, for the metrics and the record."""
        return {"skipped": self.optimiser.skipped} | self.spikes.counters

    @property
    def head(self) -> dict[str, Any]:
        """What is no tensor, for a checkpoint's manifest."""
        counters: dict[str, Any] = {"updates": self.optimiser.updates, "skipped": self.optimiser.skipped}
        anchor = {"anchor": self.anchor} if self.anchor else {}
        return counters | self.precision.head | self.averages.head | self.spikes.head | anchor

    def tensors(self) -> dict[str, Tensor]:
        """All that changes while it trains, by name: views of what is there, to be saved or to be read into.

        Buffers that a forward pass changes (batch norms') are copies, since a save goes on during the next one.
        """
        weights = self.flat.tensors(self.flat.weights)
        parts = {
            "weights": weights | {name: buffer.clone() for name, buffer in self._buffers()},
            "average": self.ema.tensors(),
            "optimiser": self.optimiser.state(),
            "powers": self.averages.tensors(),
        }
        return {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Goes to where a checkpoint was written, by however many workers."""
        from training.checkpoint import (
            load_dcp,  # resuming pays for the import of torch.distributed.checkpoint, starting does not
        )

        tensors = self.tensors()
        load_dcp(checkpoint, tensors)
        for name, buffer in self._buffers():
            buffer.copy_(tensors[f"weights.{name}"])
        self.flat.publish()
        self.optimiser.resume(checkpoint.head["updates"], checkpoint.head["skipped"])
        self.precision.load(checkpoint.head)
        self.averages.load(checkpoint.head)
        self.spikes.load(checkpoint.head)
        self.anchor = checkpoint.head.get("anchor", 0)
        self.step = checkpoint.samples // self.config.batch

    def _buffers(self) -> list[tuple[str, Tensor]]:
        kept = self.model.state_dict(keep_vars=True)
        return [(name, buffer) for name, buffer in self.model.named_buffers() if name in kept]


def newest_checkpoint(checkpoints: Checkpoints, group: Group) -> Checkpoint | None:
    """The newest checkpoint that is valid to rank 0, on every rank: two that went on from different ones would add up
    the gradients of different weights. Raises NotFound or Refused on a rank that cannot read it."""
    found = checkpoints.newest() if group.rank == 0 else None
    place = group.agreed(found and found.place)
    return checkpoints.read(place) if place and group.rank else found


def roll_back(checkpoints: Checkpoints, saver: Saver, group: Group, state: State, stage: str) -> None:
    """Returns to the anchor's weights, moments and averages, and goes on with the samples that come next.

    Where there is none yet, bad steps go on being skipped. Every rank calls it at the same step. Raises Diverged where
    that was done too often without another anchor.
    """
    if not state.anchor:
        return
    saver.wait()
    found = checkpoints.at(state.anchor) if group.rank == 0 else None
    place = group.agreed(found and found.place)
    if place is None or state.spikes.returns == MAX_RETURNS:
        why = "cannot be read any more" if place is None else f"was returned to {MAX_RETURNS} times already"
        raise Diverged(
            f"{state.spikes.in_a_row} steps in a row were no good, and the state of sample {state.anchor} {why}: "
            "training diverged. Lower train.lr, or raise train.spike.",
            code=5,
        )
    step, skipped, judged = state.step, state.optimiser.skipped, copy(state.spikes)
    state.load(found or checkpoints.read(place))
    judged.returned(state.spikes)
    state.step, state.spikes = step, judged
    state.optimiser.resume(state.optimiser.updates, skipped)
    log.warning("%s: too many bad steps; at step %d it returned to the state of sample %d", stage, step, state.anchor)


def finish_fit(
    checkpoints: Checkpoints,
    store: Store,
    state: State,
    job: Job,
    learner: LossModule,
    held: Data | None,
    *,
    sharded: bool = False,
) -> None:
    """The last checkpoint, by rank 0: the model as it is released, and the facts of its record. Nothing here depends on
    time."""
    task, group = learner.task, learner.group
    facts: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "samples": state.samples,
        **state.counters,
        "data": job.data,
        **task.facts,
    }
    released = gather_state(state.ema.state().items(), keep=group.rank == 0)
    if group.rank and not sharded:
        return
    if job.config.ema_lengths:
        judge = learner if sharded else LossModule(state.model, task, ALONE)
        released, chosen = choose_average(
            judge, state.averages, released, held, job, store, state.precision, sharded=sharded
        )
        facts |= chosen
    if group.rank:
        return

    def put() -> bool:
        with store.scratch() as folder:
            with explain_full_disk(folder):
                said = task.save(folder / RELEASE, released, dict(facts))
            return checkpoints.save(state.samples, folder, state.head | {"facts": facts | said})

    if not with_retries(store, put):
        raise Refused(f"{job.stage}: its finished model could not be stored under checkpoints/{job.key}/", code=5)


STOP, SAVE, LOSS = range(3)
