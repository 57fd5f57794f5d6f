"""The workers of tests/proofs/interrupt.py: processes over gloo, one of which is struck at a moment of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import Stopped
from infra.store.local import LocalStore
from infra.tracking.monitor import NullMonitor
from tests.fixtures.ranks import PRELOADED
from training.job import FitHow, Job

BATCH, MICRO = 12, 2
EVERY = 4
"""Steps between two checkpoints; there is one more a step before the end."""
STOPPED = 3


@dataclass(frozen=True)
class Strike:
    """accumulation, epoch: at that step, after its first micro-batch or before it; checkpoint: while that step's is
    written. signal: what the worker, the last of its group, then sends itself."""

    moment: str
    step: int
    signal: int


@dataclass(frozen=True)
class Attempt:
    """One start of a fit, by so many workers."""

    ranks: int
    shard: str
    strike: Strike | None = None


def attempt(folder: Path, job: Job, one: Attempt, number: int) -> str:
    """Makes an attempt on the store in that folder: finished, stopped (all ranks, with a checkpoint), or killed."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as meeting:
        ranks = [
            processes.Process(target=_rank, args=(rank, folder, Path(meeting) / "meet", job, one, number))
            for rank in range(one.ranks)
        ]
        for process in ranks:
            process.start()
        while any(process.is_alive() for process in ranks):
            time.sleep(0.05)
            if any(process.exitcode not in (None, 0, STOPPED) for process in ranks):
                for process in ranks:  # as Ray does: the others wait for the one that is gone
                    process.kill()
        codes = [process.exitcode for process in ranks]
    if codes[-1] == -signal.SIGKILL and one.strike is not None:
        return "killed"
    return (
        {0: "finished", STOPPED: "stopped"}.get(codes[0], f"ended with {codes}") if len(set(codes)) == 1 else str(codes)
    )


class Watch(NullMonitor):
    """What a rank notes in a file (uids of each micro-batch, metrics of each step), and when it is struck."""

    def __init__(self, path: Path, job: Job, strike: Strike | None) -> None:
        from training.data.order import derive_seed

        super().__init__()
        steps, lanes = job.config.steps, job.config.lanes
        self.places = {derive_seed("noise", job.config.seed, s, m): (s, m) for s in range(steps) for m in range(lanes)}
        self.path, self.strike, self.steps, self.step, self.micros = path, strike, steps, -1, 0

    def note(self, **said: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(said) + "\n")

    def sees(self, batch: Any) -> None:
        """Before a micro-batch's forward pass."""
        step = self.places[batch.seed][0]
        self.micros = self.micros + 1 if step == self.step else 0
        self.step = step
        self.note(seed=batch.seed, uids=[uid.hex() for uid in batch.uids])
        now = (("accumulation", step), 1), (("epoch", step), 0)
        if self.strike is not None and ((self.strike.moment, self.strike.step), self.micros) in now:
            os.kill(os.getpid(), self.strike.signal)

    def puts(self, name: str) -> None:
        """Before a file gets its name in the store."""
        part = f"/{self.strike.step * BATCH:012d}-" in name and name.endswith(".safetensors") if self.strike else False
        if self.strike is not None and self.strike.moment == "checkpoint" and part:
            os.kill(os.getpid(), self.strike.signal)

    def save_due(self) -> bool:
        return (self.step + 1) % EVERY == 0 or self.step + 2 == self.steps

    def progress(self, stage: str, done: int, total: int, unit: str = "", rate: float | None = None) -> None:
        pass

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
        self.note(step=step, values=values)


class Watched:
    """An objective whose micro-batches are watched."""

    def __init__(self, task: Any, watch: Watch) -> None:
        self._task, self._watch = task, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def loss(self, model: Any, batch: Any, group: Any) -> Any:
        self._watch.sees(batch)
        return self._task.loss(model, batch, group)


class WatchedStore(LocalStore):
    """A store whose puts are watched."""

    def __init__(self, root: Path, watch: Watch) -> None:
        super().__init__(root)
        object.__setattr__(self, "watch", watch)

    def put_new(self, name: str, data: bytes | Path) -> bool:
        self.watch.puts(name)  # type: ignore[attr-defined]
        return super().put_new(name, data)


def _rank(rank: int, folder: Path, meeting: Path, job: Job, one: Attempt, number: int) -> None:
    import torch.distributed

    from training import loop
    from training.parallel.flat import Group
    from training.preemption import handle_sigterm, sigterm_received

    handle_sigterm()
    struck = one.strike if rank == one.ranks - 1 else None
    watch = Watch(folder / f"seen-{number}-{rank}.jsonl", job, struck)
    made = loop.objective
    loop.objective = lambda *given: Watched(made(*given), watch)  # type: ignore[assignment, return-value]
    if one.ranks > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=one.ranks)
    how = FitHow(shard=one.shard, checkpoint_seconds=1e6, log_seconds=0, system_seconds=0, preview_share=0)
    try:
        loop.train(
            job,
            how,
            WatchedStore(folder, watch),
            watch,
            lease=number,
            group=Group(rank, one.ranks),
            stop=sigterm_received,
            save=watch.save_due,
        )
    except Stopped:
        sys.exit(STOPPED)
