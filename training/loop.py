"""The one training loop, for every kind of model: read it from top to bottom.

Its whole state is weights, moments, moving average, samples seen and steps skipped; what comes next follows from the
number of samples. So a run that was stopped anywhere and resumed gives, on one worker, the bytes of one that was not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from infra.errors import Refused, Stopped
from infra.store import RetryingStore, Store
from training.checkpoint import Checkpoints, Saver, is_finished, job_identity
from training.data import Batch, Data, Feed, Order
from training.job import FitHow, Job
from training.learner import LossModule, build_model
from training.objectives import objective
from training.optim import learning_rate
from training.parallel import Group, determinism, prepare_model, seed, shard_module
from training.state import ALONE, EXTRA, LOSS, SAVE, STOP, State, finish_fit, newest_checkpoint, roll_back
from training.telemetry import Clock, Monitor, Previews, by_quartile
from training.validate import split_held_out
from unclip.models import bfloat16_convolutions

CPU = torch.device("cpu")


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
    begins no second checkpoint; raises Unavailable once `how.store_wait_s` are over.
    """
    config = job.config
    torch.set_num_threads(how.threads)
    store = RetryingStore(store, how.store_wait_s)

    def told(samples: int, digest: str) -> None:
        monitor.tag(job.stage, {"unclip.checkpoint": digest, "unclip.checkpoint.samples": str(samples)})

    checkpoints = Checkpoints(
        store, job.key, lease, keep=how.keep, best=how.keep_best, job=job_identity(job), told=told
    )
    found = newest_checkpoint(checkpoints, group)
    if found and is_finished(found, job):
        return
    task = objective(job, store, device)
    if task.whole_batch and config.lanes % group.ranks:
        raise Refused(
            f"{job.stage}: {config.lanes} micro-batches do not divide among {group.ranks} workers; change train.micro"
        )
    model, sharded = build_model(job, task, how, group, device)
    model.train()
    check_divisible(job.stage, model, group.ranks)
    if getattr(config, "bfloat16_convolutions", False):
        bfloat16_convolutions(model)
    learner = LossModule(model, task, group)
    vectors = None
    prepare_model(model, how, sharded=sharded)
    if sharded:
        vectors = shard_module(learner, device, group.ranks, EXTRA)
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
    data, held = split_held_out(data, config)
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
    finish_fit(checkpoints, store, state, job, learner, held, sharded=sharded)


def check_divisible(stage: str, model: nn.Module, workers: int) -> None:
    """Raises Refused for a model whose samples cannot lie on so many workers: one with statistics of the batch."""
    if workers > 1 and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise Refused(
            f"{stage}: this model has batch norms (a ResNet's), which would see each worker's samples alone, so that "
            f"{workers} workers would train another model than one. Use one worker, or a vision transformer."
        )
