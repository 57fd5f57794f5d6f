"""Wall-clock duties of a fit: when metrics are reported, and when a checkpoint is due."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from infra.tracking import SystemMetrics
from training.job import FitHow, Job
from training.objectives import Losses
from training.options import TrainConfig
from training.parallel import Group
from training.telemetry.mfu import Utilisation
from training.telemetry.stopwatch import Stopwatch

QUARTILES = 4
WORTHWHILE_S = 20.0
"""How much longer a fit must go on for its operations to be counted and its worker's peak to be measured: that imports
torch's compiler and takes some two seconds of a core."""
SUMS = 2 * QUARTILES


class Monitor(Protocol):
    """Where progress, metrics and what else there is to see go; no call waits."""

    def progress(self, stage: str, done: int, total: int, unit: str = "", rate: float | None = None) -> None: ...

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None: ...

    def tag(self, stage: str, tags: dict[str, str]) -> None: ...

    def artifact(self, stage: str, data: bytes, name: str) -> None: ...

    def image(self, stage: str, data: bytes, name: str, step: int) -> None: ...


@dataclass
class Clock:
    """What happens by the wall clock: metrics and checkpoints, on rank 0; of the others' machines the figures alone.
    Nothing that is computed depends on it. It is a context, at whose end nothing is measured any more."""

    job: Job
    config: TrainConfig
    how: FitHow
    monitor: Monitor
    step: int | None
    """Step of the last report; None on ranks that report nothing."""
    group: Group = field(default_factory=Group)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    placed: bool = False
    """Whether this kind of loss has a place in a process, of whose quartiles there is something to say."""
    _sums: Tensor = field(default_factory=lambda: torch.zeros(QUARTILES, 2, dtype=torch.float64))
    _reported: float = field(default_factory=time.monotonic)
    _saved: float = field(default_factory=time.monotonic)
    told: dict[str, float] = field(default_factory=dict)
    """What was last reported, as far as it is finite."""
    _used: Utilisation | None = None

    def __post_init__(self) -> None:
        self._watch = Stopwatch(self.device)
        self._vitals = SystemMetrics(self.how.system_seconds, gpus=self.how.gpus > 0)

    def __enter__(self) -> Clock:
        if self.step is not None:
            name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
            self.monitor.tag(self.job.stage, {"unclip.device": name, "unclip.workers": str(self.group.ranks)})
        return self

    def __exit__(self, *raised: object) -> None:
        self._vitals.close()

    def lap(self, part: str) -> None:
        """All since the last lap was this part of a step."""
        if self.step is not None:
            self._watch.lap(part)

    def note(self, sums: Tensor) -> None:
        """Adds a step's losses, `by_quartile` and summed over the workers."""
        if self.step is not None:
            self._sums += sums.detach().double().cpu().view(QUARTILES, 2)

    def tick(self, step: int, counters: dict[str, int], lr: float, norm: float) -> None:
        """After a step: reports every `log_seconds`, and at the end."""
        now = time.monotonic()
        if self.step is None:
            self._tell_vitals(step)
            return
        if now - self._reported < self.how.log_seconds and step < self.config.steps:
            return
        rate = (step - self.step) * self.config.batch / max(now - self._reported, 1e-9)
        total, count = self._sums.sum(0).tolist()
        values = {
            "loss": total / max(count, 1),
            "gradient_norm": norm,
            "lr": lr,
            "samples_per_s": rate,
            **{name: float(count) for name, count in counters.items()},
        }
        if self.placed:
            quartiles = {
                f"loss_q{number}": (row[0] / row[1]) for number, row in enumerate(self._sums.tolist()) if row[1]
            }
            values |= quartiles
        values |= {f"time/{part}": share for part, share in self._watch.shares().items()}
        values |= {f"system/{name}": value for name, value in self._vitals.new().items()}
        if self._used is not None:
            values["mfu"] = self._used.of(rate)
        self.told = {name: value for name, value in values.items() if math.isfinite(value)}
        self.monitor.metrics(self.job.stage, step, values)
        self.monitor.progress(self.job.stage, step, self.config.steps, "steps", rate / self.config.batch)
        if self._used is None and (self.config.steps - step) * self.config.batch > WORTHWHILE_S * rate:
            self._used = Utilisation(self.job, self.how, self.device, self.group.ranks)
            self._watch.shares()  # nobody's time
            now = time.monotonic()
        self._sums.zero_()
        self._reported, self.step = now, step

    def checkpoint_due(self) -> bool:
        """True once every `checkpoint_seconds`, on the rank that reports."""
        if self.step is None or time.monotonic() - self._saved < self.how.checkpoint_seconds:
            return False
        self._saved = time.monotonic()
        return True

    def _tell_vitals(self, step: int) -> None:
        """How a machine fares whose rank reports nothing else."""
        if found := self._vitals.new():
            values = {f"system/{self.group.rank}/{name}": value for name, value in found.items()}
            self.monitor.metrics(self.job.stage, step, values)


def by_quartile(losses: Losses) -> Tensor:
    """[SUMS]: of each quartile of the place in the process (all in the first where there is none), the sum of the
    losses and their number, on their device."""
    loss = losses.loss.detach().float()
    place = torch.zeros_like(loss) if losses.place is None else losses.place
    quartile = torch.arange(QUARTILES, device=loss.device)[:, None] == (place * QUARTILES).long()
    # Chosen, not multiplied: a loss that is not finite is its own quartile's.
    found = torch.stack([torch.where(quartile, loss, 0.0).sum(1), quartile.sum(1).float()], 1)
    return found.flatten()
