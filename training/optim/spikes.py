"""Skips steps whose loss or gradient spikes, and rolls back after too many in a row.

A spike is judged by the logarithms of the batch's mean loss and of the gradient's norm, against the median and the
median absolute deviation of the steps last taken: neither is moved by the outliers that they are to find. All that
decides is in the checkpoint and the same on every rank, so that a resumed run skips what an undisturbed one skips.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from training.options import TrainConfig

WINDOW = 128
"""Steps last taken that a step is measured by."""
LEAST = 32
"""Steps taken before anything is called a spike."""
DEVIATION = 1.4826
"""Median absolute deviations in a normal distribution's standard deviation."""
FLOOR = 0.05
"""The least deviation of a logarithm that is believed: 5 %, lest a run as smooth as glass take a ripple for a spike."""


class Spikes:
    """Judges each step, and counts those that are bad; never a spike where `train.spike` is 0."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._taken: list[tuple[float, float]] = []
        """log loss and log norm of the steps last taken, the oldest first."""
        self.in_a_row = 0
        self.spikes = 0
        self.rollbacks = 0
        self.returns = 0
        """Rollbacks since the state that one goes back to was last renewed."""

    @property
    def on(self) -> bool:
        """Whether anything is judged at all."""
        return self._config.spike > 0

    def is_spike(self, loss: float, norm: float) -> bool:
        """Whether a step of this mean loss and gradient norm leaps out of those before it; a NaN does."""
        if not self.on:
            return False
        logs = _log(loss), _log(norm)
        if not all(map(math.isfinite, logs)):
            return True
        if len(self._taken) < LEAST:
            return False
        return any(self._leaps(log, column) for log, column in zip(logs, zip(*self._taken, strict=True), strict=True))

    def note(self, loss: float, norm: float, *, taken: bool, counts: bool = True) -> None:
        """After a step: whether it was taken; counts: whether one that was not is training's fault."""
        if not self.on:
            return
        if taken:
            self.in_a_row = 0
            self._taken = [*self._taken, (_log(loss), _log(norm))][-WINDOW:]
        elif counts:
            self.in_a_row += 1
            self.spikes += 1

    @property
    def too_many(self) -> bool:
        """Whether so many steps in a row were bad that the weights are to blame."""
        return self.on and self.in_a_row >= self._config.rollback_after

    def anchor_due(self, step: int) -> bool:
        """Whether the state after that step is one to go back to: every `rollback_every` steps, none amid bad ones."""
        return self.on and not self.in_a_row and step % self._config.rollback_every == 0

    def returned(self, judged: Spikes) -> None:
        """After a return to where steps were judged so: what was measured since is forgotten, not the counts."""
        self._taken = judged._taken
        self.in_a_row, self.rollbacks, self.returns = 0, self.rollbacks + 1, self.returns + 1

    @property
    def counters(self) -> dict[str, int]:
        """For the metrics and the record; empty where nothing is judged."""
        return {"spikes": self.spikes, "rollbacks": self.rollbacks} if self.on else {}

    @property
    def head(self) -> dict[str, Any]:
        """What decides, for a checkpoint's head; empty where nothing is judged."""
        names = ("in_a_row", "spikes", "rollbacks", "returns")
        return {"spikes": {"taken": self._taken, **{name: getattr(self, name) for name in names}}} if self.on else {}

    def load(self, head: dict[str, Any]) -> None:
        """The inverse of `head`."""
        if self.on:
            said = dict(head["spikes"])
            self._taken = [(loss, norm) for loss, norm in said.pop("taken")]
            vars(self).update(said)

    def _leaps(self, log: float, before: tuple[float, ...]) -> bool:
        middle = statistics.median(before)
        deviation = DEVIATION * statistics.median(abs(value - middle) for value in before)
        return log - middle > self._config.spike * max(deviation, FLOOR)


def _log(value: float) -> float:
    """Its logarithm; of a loss that may be 0 or below (none of ours is by much) that of the smallest number."""
    return math.log(max(value, 1e-30)) if math.isfinite(value) else math.inf
