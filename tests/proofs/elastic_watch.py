"""What the workers of tests/proofs/elastic.py note, and where one of them is struck."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from infra.store.local import LocalStore
from infra.tracking.monitor import NullMonitor
from tests.proofs.interrupt_ranks import Watched
from training.job import Job

FIRST = 5
"""The step at which a worker is struck, between two micro-batches; or behind which, in a checkpoint."""
PACE_S = 0.2
"""What a micro-batch takes longer until three workers are there again, lest the fit end before."""


class Watch(NullMonitor):
    """What each worker notes in a file of its own (uids and workers of each micro-batch, metrics of each step), and
    where the last of three is struck. Unpickled in a worker, it begins to watch the loop there."""

    def __init__(self, folder: Path, job: Job, moment: str, step: int) -> None:
        super().__init__()
        self.folder, self.job, self.moment, self.step = folder, job, moment, step
        self.micros: dict[int, int] = {}
        self.places: dict[int, tuple[int, int]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        from training import loop

        self.places = places(self.job)
        made, put = loop.objective, LocalStore.put_new
        loop.objective = lambda *given: Watched(made(*given), self)  # type: ignore[assignment, return-value]

        def put_new(store: LocalStore, name: str, data: bytes | Path) -> bool:
            if (
                name.startswith("checkpoints/")
                and name.endswith(".safetensors")
                and max(self.micros, default=0) > FIRST
            ):
                self._strike("checkpoint", FIRST)
            return put(store, name, data)

        LocalStore.put_new = put_new  # type: ignore[method-assign]

    def sees(self, batch: Any) -> None:
        """Before a micro-batch's forward pass."""
        step, _ = self.places[batch.seed]
        self.micros[step] = self.micros.get(step, -1) + 1
        self._note(seed=batch.seed, uids=[uid.hex() for uid in batch.uids], ranks=_ranks()[1])
        self._strike("accumulation" if self.micros[step] else "epoch", step)
        if not (self.folder / "fast").exists():
            time.sleep(PACE_S)

    def _strike(self, moment: str, step: int) -> None:
        rank, ranks = _ranks()
        if (moment, step) == (self.moment, self.step) and rank == ranks - 1 and not (self.folder / "struck").exists():
            (self.folder / "being-struck").write_text(str(os.getpid()))
            (self.folder / "being-struck").rename(self.folder / "struck")
            os.kill(os.getpid(), signal.SIGSTOP)

    def _note(self, **said: Any) -> None:
        with (self.folder / f"seen-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(said | {"time": time.time()}) + "\n")

    def progress(self, stage: str, done: int, total: int, unit: str = "", rate: float | None = None) -> None:
        pass

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
        self._note(step=step, values=values)


def places(job: Job) -> dict[int, tuple[int, int]]:
    """(step, micro-batch) by the seed of its noise."""
    from training.data.order import derive_seed

    steps, lanes = job.config.steps, job.config.lanes
    return {derive_seed("noise", job.config.seed, s, m): (s, m) for s in range(steps) for m in range(lanes)}


def _ranks() -> tuple[int, int]:
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
