"""Fits by several ranks at once, in processes of their own over gloo, without Ray."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import Refused, Stopped
from infra.store.local import LocalStore
from infra.tracking.monitor import NullMonitor
from training.job import FitHow, Job

PRELOADED = [
    "training.loop",
    "training.checkpoint.dcp",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "pyarrow.parquet",
]
"""What one process imports for all ranks, which are forked from it; it computes nothing."""


@dataclass(frozen=True)
class Ask:
    """One fit: `stop_after` so many steps of this start, None: to the end."""

    job: Job
    how: FitHow
    lease: int = 0
    stop_after: int | None = None


class Told(NullMonitor):
    """Notes the metrics of each fit in a file beside the store's."""

    def __init__(self, root: Path, key: str) -> None:
        super().__init__()
        self._path = root / f"told-{key}.jsonl"

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(values | {"step": step}) + "\n")

    @property
    def losses(self) -> list[dict[str, float]]:
        """All that was said of losses, report by report."""
        told = [json.loads(line) for line in self._path.read_text().splitlines()]
        return [{name: line[name] for name in sorted(line) if name.startswith("loss")} for line in told]


def stopping_after(steps: int | None) -> Any:
    """Says yes from the steps-th time on that it is asked."""
    asked = iter(range(steps - 1 if steps is not None else 1 << 30))
    return lambda: next(asked, None) is None


def together(root: Path, ranks: int, asks: Sequence[Ask]) -> list[str]:
    """Does the fits one after the other, all ranks at each; what rank 0 met with in each: "", or what was raised."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    answers = server.Queue()
    with tempfile.TemporaryDirectory() as meeting:
        processes = [
            server.Process(target=_rank, args=(rank, ranks, root, Path(meeting), list(asks), answers))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if codes := [process.exitcode for process in processes if process.exitcode]:
        raise RuntimeError(f"ranks ended with {codes}")
    return answers.get(timeout=10)


def _rank(rank: int, ranks: int, root: Path, meeting: Path, asks: Sequence[Ask], answers: Any) -> None:
    import torch.distributed

    from training.loop import train
    from training.parallel.flat import Group

    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}/meet", rank=rank, world_size=ranks)
    met = []
    for ask in asks:
        try:
            train(
                ask.job,
                ask.how,
                LocalStore(root),
                Told(root, ask.job.key),
                lease=ask.lease,
                group=Group(rank, ranks),
                stop=stopping_after(ask.stop_after),
            )
            met.append("")
        except (Stopped, Refused) as error:
            met.append(str(error))
    if rank == 0:
        answers.put(met)
    torch.distributed.destroy_process_group()
