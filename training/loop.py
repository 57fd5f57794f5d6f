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
from training.averages import Averages
from training.checkpoint import RELEASE, Checkpoint, Checkpoints, finished
from training.data import Batch, Data
from training.ema import Ema
from training.feed import Feed
from training.job import FitHow, Job, TrainConfig
from training.muon import is_inner
from training.objectives import Losses, Objective, objective
from training.optim import Optimiser, learning_rate
from training.order import Order
from training.parallel import Flat, Group
from training.precision import Precision
from training.validate import choose, split
from unclip.folder import read_tensors, write_tensors
from unclip.layers import bfloat16_convolutions

QUARTILES = 4
POWERS = "powers.safetensors"
"""A checkpoint's file of the averages that `ema_lengths` are made of, where there are any."""
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
) -> None:
    """Trains to the end, on from the newest valid checkpoint; the last one holds the finished model under `RELEASE`.

    Every rank calls it. `stop` is asked after each step; if any rank says yes, rank 0 saves and all raise Stopped.
    """
    config = job.config
    torch.set_num_threads(how.threads)
    checkpoints = Checkpoints(store, job.key, lease)
    found = newest(checkpoints, group)
    if found and finished(found, job):
        return
    task = objective(job, store, device)
    if task.whole_batch and config.lanes % group.ranks:
        raise Refused(
            f"{job.stage}: {config.lanes} micro-batches do not divide among {group.ranks} workers; change train.micro"
        )
    torch.manual_seed(config.seed)
    model = task.build().to(device).train()
    check_divisible(job.stage, model, group.ranks)
    if getattr(config, "bfloat16_convolutions", False):
        bfloat16_convolutions(model)
    state = State(config, model)
    if found:
        state.load(found)
    data = Data(
        store, job.data["rows"], job.data["selection"], task.reads, read_text=task.read_text, cache=how.cache_bytes
    )
    data, held = split(data, config)
    order = Order(data.counts, config.lanes, config.micro_size, config.window, config.seed)
    lanes = group.lanes(config.lanes)
    clock = Clock(job, config, how, monitor, state.step if group.rank == 0 else None)
    with Feed(data, order, [lane for lane, _ in lanes], state.step, config.steps, how.prefetch, how.threads) as feed:
        while state.step < config.steps:
            state.flat.wire.zero_()
            micros = [(feed.next().to(device), weight) for _, weight in lanes]
            if task.whole_batch:
                micros = [(Batch.joined([batch for batch, weight in micros if weight]), 1.0)]
            for batch, weight in micros:
                torch.manual_seed(batch.seed)  # for dropout
                with state.precision.autocast():
                    losses = task.loss(model, batch, group)
                (losses.loss.sum() * (weight / config.batch * state.precision.scale)).backward()
                clock.note(losses, weight)
            state.flat.extra[0] = float(stop())
            group.add(state.flat.wire)
            stopping = bool(state.flat.extra[0])
            lr = learning_rate(config, state.step)
            norm = state.update(lr)
            clock.tick(state.step, state.optimiser.skipped, lr, norm)
            if group.rank == 0 and state.averages.due(state.step, state.optimiser.updates):
                state.averages.snapshot(store, job.key, state.optimiser.updates)
            if group.rank == 0 and state.step < config.steps and (stopping or clock.checkpoint_due()):
                save(checkpoints, store, state)
            if stopping and state.step < config.steps:
                raise Stopped(f"{job.stage} stopped at step {state.step} of {config.steps}")
    if group.rank == 0:
        finish(checkpoints, store, state, job, task, held)


def check_divisible(stage: str, model: nn.Module, workers: int) -> None:
    """Raises Refused for a model whose samples cannot lie on so many workers: one with statistics of the batch."""
    if workers > 1 and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise Refused(
            f"{stage}: this model has batch norms (a ResNet's), which would see each worker's samples alone, so that "
            f"{workers} workers would train another model than one. Use one worker, or a vision transformer."
        )


class State:
    """All that a run is: the model, the optimiser, the moving average, and how many steps were done."""

    def __init__(self, config: TrainConfig, model: nn.Module) -> None:
        self.config, self.model = config, model
        self.flat = Flat(model, extra=1, inner=is_inner if config.muon else None)
        self.optimiser = Optimiser(self.flat, config)
        self.ema = Ema(model, self.flat, config.ema, config.ema_ramp)
        self.averages = Averages(model, self.flat, config)
        self.precision = Precision(config.precision, self.flat.weights.device)
        self.step = 0

    @property
    def samples(self) -> int:
        """Samples seen by all workers together."""
        return self.step * self.config.batch

    def update(self, lr: float) -> float:
        """One step on the gradient that stands in `flat`; returns its norm."""
        updates = self.optimiser.updates
        self.precision.unscale_(self.flat.gradient)
        norm = self.optimiser.step(lr)
        self.precision.update(finite=math.isfinite(norm))
        if self.optimiser.updates > updates:
            self.ema.update(self.optimiser.updates)
            self.averages.update(self.optimiser.updates)
        self.step += 1
        return norm

    @property
    def head(self) -> dict[str, Any]:
        """The counters, for a checkpoint's manifest."""
        counters = {"updates": self.optimiser.updates, "skipped": self.optimiser.skipped}
        return counters | self.precision.head | self.averages.head

    def load(self, checkpoint: Checkpoint) -> None:
        """Goes to where a checkpoint was written."""
        self.model.load_state_dict(read_tensors(checkpoint.files["weights.safetensors"]))
        self.ema.load(read_tensors(checkpoint.files["average.safetensors"]))
        moments = read_tensors(checkpoint.files["optimiser.safetensors"])
        self.optimiser.load(moments, checkpoint.head["updates"], checkpoint.head["skipped"])
        self.precision.load(checkpoint.head)
        powers = checkpoint.files.get(POWERS)
        self.averages.load(read_tensors(powers) if powers else {}, checkpoint.head)
        self.step = checkpoint.samples // self.config.batch


def newest(checkpoints: Checkpoints, group: Group) -> Checkpoint | None:
    """The newest checkpoint that is valid to rank 0, on every rank: two that went on from different ones would add up
    the gradients of different weights. Raises NotFound or Refused on a rank that cannot read it."""
    found = checkpoints.newest() if group.rank == 0 else None
    place = group.agreed(found and found.place)
    return checkpoints.read(place) if place and group.rank else found


def save(checkpoints: Checkpoints, store: Store, state: State) -> None:
    """A checkpoint in the midst of a run."""
    with store.scratch() as folder:
        write_tensors(folder / "weights.safetensors", state.model.state_dict())
        write_tensors(folder / "average.safetensors", state.ema.state())
        write_tensors(folder / "optimiser.safetensors", state.optimiser.state())
        if powers := state.averages.state():
            write_tensors(folder / POWERS, powers)
        checkpoints.save(state.samples, folder, state.head)


def finish(checkpoints: Checkpoints, store: Store, state: State, job: Job, task: Objective, held: Data | None) -> None:
    """The last checkpoint: the model as it is released, and the facts of its record. Nothing here depends on time."""
    facts: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "samples": state.samples,
        "skipped": state.optimiser.skipped,
        "data": job.data,
        **task.facts,
    }
    released = state.ema.state()
    if job.config.ema_lengths:
        released, chosen = choose(task, state.model, state.averages, held, job, store, state.precision)
        facts |= chosen
    with store.scratch() as folder:
        facts |= task.save(folder / RELEASE, released, facts)
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
        self.monitor.metrics(self.job.stage, step, values)
        self.monitor.progress(self.job.stage, step, self.config.steps, "steps", rate / self.config.batch)
        self._sums.zero_()
        self._reported, self.step = now, step

    def checkpoint_due(self) -> bool:
        """True once every `checkpoint_seconds`."""
        if time.monotonic() - self._saved < self.how.checkpoint_seconds:
            return False
        self._saved = time.monotonic()
        return True
