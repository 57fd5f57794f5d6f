"""The one training loop, for every kind of model: read it from top to bottom.

Its whole state is weights, moments, moving average, samples seen and steps skipped; what comes next follows from the
number of samples. So a run that was stopped anywhere and resumed gives, on one worker, the bytes of one that was not.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import Refused, Stopped
from infra.store.base import Store
from infra.store.retry import Patient, patiently
from training.checkpoint.saver import Saver, room_for
from training.checkpoint.store import RELEASE, Checkpoint, Checkpoints, finished, identity
from training.data.batches import Batch, Data
from training.data.feed import Feed
from training.data.order import Order
from training.job import FitHow, Job, TrainConfig
from training.objectives.base import objective
from training.optim.averages import Averages
from training.optim.ema import Ema
from training.optim.muon import is_inner
from training.optim.optimizer import Diverged, Optimiser, learning_rate
from training.optim.precision import Precision
from training.optim.spikes import Spikes
from training.parallel.flat import Flat, Group, Vectors
from training.parallel.fsdp import Learner, built, shard, whole
from training.parallel.modes import determinism, prepare, seed
from training.telemetry.clock import SUMS, Clock, Monitor, by_quartile
from training.telemetry.preview import Previews
from training.validate import choose, split
from unclip.models.layers import bfloat16_convolutions

STOP, SAVE, LOSS = range(3)
EXTRA = 3 + SUMS
"""What the ranks agree on with each gradient: whether any was asked to stop, whether rank 0 finds a save due, the
batch's mean loss; and behind these, what the clock tells of the losses."""
MAX_RETURNS = 3
"""Returns to one and the same state; after that training has diverged."""
ALONE = Group()
CPU = torch.device("cpu")

log = logging.getLogger(__name__)


def train(
    job: Job,
    how: FitHow,
    store: Store,
    monitor: Monitor,
    *,
    lease: int = 0,
    group: Group = ALONE,
    device: torch.device = CPU,
    stop: Callable[[], bool] = lambda: False,
    save: Callable[[], bool] = lambda: False,
) -> None:
    """Trains to the end, on from the newest valid checkpoint; the last one holds the finished model under `RELEASE`.

    Every rank calls it. `stop` and `save` are asked at each step; if any rank says yes, all save after it, and for
    `stop` raise Stopped. While the store is slow or not to be reached, training goes on with the rows that it has, and
    begins no second checkpoint; raises Unavailable once `how.patience_s` are over.
    """
    config = job.config
    torch.set_num_threads(how.threads)
    store = Patient(store, how.patience_s)

    def told(samples: int, digest: str) -> None:
        monitor.tag(job.stage, {"unclip.checkpoint": digest, "unclip.checkpoint.samples": str(samples)})

    checkpoints = Checkpoints(store, job.key, lease, keep=how.keep, best=how.keep_best, job=identity(job), told=told)
    found = newest(checkpoints, group)
    if found and finished(found, job):
        return
    task = objective(job, store, device)
    if task.whole_batch and config.lanes % group.ranks:
        raise Refused(
            f"{job.stage}: {config.lanes} micro-batches do not divide among {group.ranks} workers; change train.micro"
        )
    model, sharded = built(job, task, how, group, device)
    model.train()
    check_divisible(job.stage, model, group.ranks)
    if getattr(config, "bfloat16_convolutions", False):
        bfloat16_convolutions(model)
    learner = Learner(model, task, group)
    vectors = None
    prepare(model, how, sharded=sharded)
    if sharded:
        vectors = shard(learner, device, group.ranks, EXTRA)
    else:
        model.to(device)
    state = State(config, model, vectors, group)
    if found:
        state.load(found)
    data = Data(
        store,
        job.data["rows"],
        job.data["selection"],
        task.reads,
        read_text=task.read_text,
        cache=how.cache_bytes,
        decoders=how.decoders,
    )
    data, held = split(data, config)
    order = Order(data.counts, config.lanes, config.micro_size, config.window, config.seed, config.spread)
    lanes = group.lanes(config.lanes)
    clock = Clock(job, config, how, monitor, state.step if group.rank == 0 else None, group, device)
    previews = Previews(job, how, task, model, held or data, monitor, state.precision, group, sharded=sharded)
    with (
        determinism(how.deterministic),
        clock,
        Saver(checkpoints, group, overlap=how.overlap) as saver,
        Feed(data, order, [lane for lane, _ in lanes], state.step, config.steps, how.prefetch, how.threads) as feed,
    ):
        while state.step < config.steps:
            state.flat.wire.zero_()
            micros = [(feed.next().to(device), weight) for _, weight in lanes]
            if task.whole_batch:
                micros = [(Batch.joined([batch for batch, weight in micros if weight]), 1.0)]
            clock.lap("data")
            for batch, weight in micros:
                seed(batch.seed, device)
                with state.precision.autocast():
                    losses = learner(batch)
                loss = losses.loss.sum()
                (loss * (weight / config.batch * state.precision.scale)).backward()
                state.flat.extra[LOSS] += loss.detach() * (weight / config.batch)
                if weight:
                    state.flat.extra[LOSS + 1 :] += by_quartile(losses)
                    clock.placed = losses.place is not None
            clock.lap("forward_backward")
            due = save() or (not saver.writing and clock.checkpoint_due())  # else it would stand still for the store
            state.flat.extra[STOP], state.flat.extra[SAVE] = float(stop()), float(due)
            state.flat.add(group)
            stopping, saving = bool(state.flat.extra[STOP]), bool(state.flat.extra[SAVE])
            clock.note(state.flat.extra[LOSS + 1 :])
            clock.lap("exchange")
            lr = learning_rate(config, state.step)
            saver.before_update()
            clock.lap("checkpoint")
            norm = state.update(lr)
            if state.spikes.too_many:
                roll_back(checkpoints, saver, group, state, job.stage)
            clock.lap("optimiser")
            clock.tick(state.step, state.counters, lr, norm)
            if state.averages.due(state.step, state.optimiser.updates):
                state.averages.snapshot(store, job.key, state.optimiser.updates, group)
            renewed = state.renew_anchor()
            if (stopping or saving or renewed) and state.step < config.steps:
                saver.save(state.samples, state.tensors(), state.head | {"metrics": clock.told})
            clock.lap("checkpoint")
            if previews.due() and not stopping:
                previews.show(state.step, state.ema.state())
                clock.lap("preview")
            if stopping and state.step < config.steps:
                saver.wait()
                raise Stopped(f"{job.stage} stopped at step {state.step} of {config.steps}")
        saver.wait()
    finish(checkpoints, store, state, job, learner, held, sharded=sharded)


def check_divisible(stage: str, model: nn.Module, workers: int) -> None:
    """Raises Refused for a model whose samples cannot lie on so many workers: one with statistics of the batch."""
    if workers > 1 and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise Refused(
            f"{stage}: this model has batch norms (a ResNet's), which would see each worker's samples alone, so that "
            f"{workers} workers would train another model than one. Use one worker, or a vision transformer."
        )


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
        from training.checkpoint.dcp import (
            load,  # resuming pays for the import of torch.distributed.checkpoint, starting does not
        )

        tensors = self.tensors()
        load(checkpoint, tensors)
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


def newest(checkpoints: Checkpoints, group: Group) -> Checkpoint | None:
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


def finish(
    checkpoints: Checkpoints,
    store: Store,
    state: State,
    job: Job,
    learner: Learner,
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
    released = whole(state.ema.state().items(), keep=group.rank == 0)
    if group.rank and not sharded:
        return
    if job.config.ema_lengths:
        judge = learner if sharded else Learner(state.model, task, ALONE)
        released, chosen = choose(judge, state.averages, released, held, job, store, state.precision, sharded=sharded)
        facts |= chosen
    if group.rank:
        return

    def put() -> bool:
        with store.scratch() as folder:
            with room_for(folder):
                said = task.save(folder / RELEASE, released, dict(facts))
            return checkpoints.save(state.samples, folder, state.head | {"facts": facts | said})

    if not patiently(store, put):
        raise Refused(f"{job.stage}: its finished model could not be stored under checkpoints/{job.key}/", code=5)
