"""The one training loop, for every kind of model: read it from top to bottom.

Its whole state is weights, moments, moving average, samples seen and steps skipped; what comes next follows from the
number of samples. So a run that was stopped anywhere and resumed gives, on one worker, the bytes of one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from infra.errors import Refused, Stopped
from infra.store import Store
from training.checkpoint import RELEASE, Checkpoint, Checkpoints, finished, identity
from training.data import Batch, Data
from training.ema import Ema
from training.feed import Feed
from training.job import FitHow, Job, TrainConfig
from training.muon import is_inner
from training.objectives import Losses, Objective, objective
from training.optim import Optimiser, learning_rate
from training.order import Order
from training.parallel import Flat, Group, Vectors
from training.saving import Saver
from training.sharded import Learner, is_sharded, shard, whole
from unclip.layers import bfloat16_convolutions

QUARTILES = 4
EXTRA = 2
STOP, SAVE = range(EXTRA)
"""What the ranks agree on with each gradient: whether any was asked to stop, whether rank 0 finds a save due."""
ALONE = Group()
CPU = torch.device("cpu")


class Monitor(Protocol):
    """Where progress and metrics go; no call waits."""

    def progress(self, stage: str, done: int, total: int, unit: str = "", rate: float | None = None) -> None: ...

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None: ...


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
    `stop` raise Stopped.
    """
    config = job.config
    torch.set_num_threads(how.threads)
    checkpoints = Checkpoints(store, job.key, lease, keep=how.keep, best=how.keep_best, job=identity(job))
    found = newest(checkpoints, group)
    if found and finished(found, job):
        return
    task = objective(job, store, device)
    if task.whole_batch and config.lanes % group.ranks:
        raise Refused(
            f"{job.stage}: {config.lanes} micro-batches do not divide among {group.ranks} workers; change train.micro"
        )
    torch.manual_seed(config.seed)
    model = task.build().train()
    check_divisible(job.stage, model, group.ranks)
    if getattr(config, "bfloat16_convolutions", False):
        bfloat16_convolutions(model)
    learner = Learner(model, task, group)
    vectors = None
    if is_sharded(how, config, task, model, group.ranks, device):
        vectors = shard(learner, device, group.ranks, EXTRA)
    else:
        model.to(device)
    state = State(config, model, vectors)
    if found:
        state.load(found)
    data = Data(
        store, job.data["rows"], job.data["selection"], task.reads, read_text=task.read_text, cache=how.cache_bytes
    )
    order = Order(data.counts, config.lanes, config.micro_size, config.window, config.seed)
    lanes = group.lanes(config.lanes)
    clock = Clock(job, config, how, monitor, state.step if group.rank == 0 else None)
    with (
        Saver(checkpoints, group, overlap=how.overlap) as saver,
        Feed(data, order, [lane for lane, _ in lanes], state.step, config.steps, how.prefetch, how.threads) as feed,
    ):
        while state.step < config.steps:
            state.flat.wire.zero_()
            micros = [(feed.next().to(device), weight) for _, weight in lanes]
            if task.whole_batch:
                micros = [(Batch.joined([batch for batch, weight in micros if weight]), 1.0)]
            for batch, weight in micros:
                torch.manual_seed(batch.seed)  # for dropout
                losses = learner(batch)
                (losses.loss.sum() * (weight / config.batch)).backward()
                clock.note(losses, weight)
            state.flat.extra[STOP], state.flat.extra[SAVE] = float(stop()), float(clock.checkpoint_due() or save())
            state.flat.add(group)
            stopping, saving = bool(state.flat.extra[STOP]), bool(state.flat.extra[SAVE])
            lr = learning_rate(config, state.step)
            saver.before_update()
            norm = state.update(lr)
            clock.tick(state.step, state.optimiser.skipped, lr, norm)
            if (stopping or saving) and state.step < config.steps:
                saver.save(state.samples, state.tensors(), state.head | {"metrics": clock.told})
            if stopping and state.step < config.steps:
                saver.wait()
                raise Stopped(f"{job.stage} stopped at step {state.step} of {config.steps}")
        saver.wait()
    finish(checkpoints, store, state, job, task, group)


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

    def __init__(self, config: TrainConfig, model: nn.Module, vectors: Vectors | None = None) -> None:
        self.config, self.model = config, model
        self.flat = vectors or Flat(model, extra=EXTRA, inner=is_inner if config.muon else None)
        self.optimiser = Optimiser(self.flat, config)
        self.ema = Ema(model, self.flat, config.ema, config.ema_ramp)
        self.step = 0

    @property
    def samples(self) -> int:
        """Samples seen by all workers together."""
        return self.step * self.config.batch

    def update(self, lr: float) -> float:
        """One step on the gradient that stands in `flat`; returns its norm."""
        updates = self.optimiser.updates
        norm = self.optimiser.step(lr)
        if self.optimiser.updates > updates:
            self.ema.update(self.optimiser.updates)
        self.step += 1
        return norm

    @property
    def head(self) -> dict[str, Any]:
        """The counters, for a checkpoint's manifest."""
        return {"updates": self.optimiser.updates, "skipped": self.optimiser.skipped}

    def tensors(self) -> dict[str, Tensor]:
        """All that changes while it trains, by name: views of what is there, to be saved or to be read into.

        Buffers that a forward pass changes (batch norms') are copies, since a save goes on during the next one.
        """
        weights = self.flat.tensors(self.flat.weights)
        parts = {
            "weights": weights | {name: buffer.clone() for name, buffer in self._buffers()},
            "average": self.ema.tensors(),
            "optimiser": self.optimiser.state(),
        }
        return {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Goes to where a checkpoint was written, by however many workers."""
        from training.dcp import load  # resuming pays for the import of torch.distributed.checkpoint, starting does not

        tensors = self.tensors()
        load(checkpoint, tensors)
        for name, buffer in self._buffers():
            buffer.copy_(tensors[f"weights.{name}"])
        self.flat.publish()
        self.optimiser.resume(checkpoint.head["updates"], checkpoint.head["skipped"])
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


def finish(
    checkpoints: Checkpoints, store: Store, state: State, job: Job, task: Objective, group: Group = ALONE
) -> None:
    """The last checkpoint, by rank 0: the model as it is released, and the facts of its record. Nothing here depends on
    time."""
    facts: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "samples": state.samples,
        "skipped": state.optimiser.skipped,
        "data": job.data,
        **task.facts,
    }
    average = whole(state.ema.state().items(), keep=group.rank == 0)
    if group.rank:
        return
    with store.scratch() as folder:
        facts |= task.save(folder / RELEASE, average, facts)
        if not checkpoints.save(state.samples, folder, state.head | {"facts": facts}):
            raise Refused(f"{job.stage}: its finished model could not be stored under checkpoints/{job.key}/", code=5)


@dataclass
class Clock:
    """What happens by the wall clock, on rank 0: metrics and checkpoints. Nothing that is computed depends on it."""

    job: Job
    config: TrainConfig
    how: FitHow
    monitor: Monitor
    step: int | None
    """Step of the last report; None on ranks that report nothing."""
    _placed: bool = False
    """Whether this kind of loss has a place in a process, of whose quartiles there is something to say."""
    _sums: Tensor = field(default_factory=lambda: torch.zeros(QUARTILES, 2, dtype=torch.float64))
    _reported: float = field(default_factory=time.monotonic)
    _saved: float = field(default_factory=time.monotonic)
    told: dict[str, float] = field(default_factory=dict)
    """What was last reported, as far as it is finite."""

    def note(self, losses: Losses, weight: float) -> None:
        """Adds a micro-batch's losses, by quartile of the timestep."""
        if self.step is None or not weight:
            return
        self._placed = losses.place is not None
        loss = losses.loss.detach().double().cpu()
        place = torch.zeros(len(loss)) if losses.place is None else losses.place.detach().cpu()
        self._sums.index_add_(0, (place * QUARTILES).long(), torch.stack([loss, torch.ones_like(loss)], 1))

    def tick(self, step: int, skipped: int, lr: float, norm: float) -> None:
        """After a step: reports every `log_seconds`, and at the end."""
        now = time.monotonic()
        if self.step is None or (now - self._reported < self.how.log_seconds and step < self.config.steps):
            return
        rate = (step - self.step) * self.config.batch / max(now - self._reported, 1e-9)
        total, count = self._sums.sum(0).tolist()
        values = {
            "loss": total / max(count, 1),
            "gradient_norm": norm,
            "lr": lr,
            "samples_per_s": rate,
            "skipped": float(skipped),
        }
        if self._placed:
            quartiles = {
                f"loss_q{number}": (row[0] / row[1]) for number, row in enumerate(self._sums.tolist()) if row[1]
            }
            values |= quartiles
        self.told = {name: value for name, value in values.items() if math.isfinite(value)}
        self.monitor.metrics(self.job.stage, step, values)
        self.monitor.progress(self.job.stage, step, self.config.steps, "steps", rate / self.config.batch)
        self._sums.zero_()
        self._reported, self.step = now, step

    def checkpoint_due(self) -> bool:
        """True once every `checkpoint_seconds`, on the rank that reports."""
        if self.step is None or time.monotonic() - self._saved < self.how.checkpoint_seconds:
            return False
        self._saved = time.monotonic()
        return True
