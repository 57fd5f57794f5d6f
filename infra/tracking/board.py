"""Progress of a run: the latest of each stage, and for stages of many shards how many rows ended in which state.

Pure bookkeeping, without Ray and MLflow; monitor.py holds one, and tells others of it.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from infra.records import KEPT

NEUTRAL = frozenset({"listed", "looked", "counted", "sampled"})
"""States of rows in stages that go through all rows and reject none."""
WINDOW_S = 30.0
"""Rows per second are of the last so many seconds."""


def success_rate(states: Mapping[str, int]) -> float | None:
    """The share of rows that were kept, 0 … 1; None where there are none, or the stage keeps and rejects none."""
    rows = sum(states.values())
    return states.get(KEPT, 0) / rows if rows and not states.keys() <= NEUTRAL else None


@dataclass(frozen=True)
class StageExtent:
    """What a stage of many shards has before it and behind it when it begins."""

    shards: int
    """Its shards in all."""
    present: int = 0
    """Of these, done by runs before."""
    states: Mapping[str, int] = field(default_factory=dict)
    """Rows of those by state."""
    ago: float = 0.0
    """Seconds since it began."""


@dataclass
class StageProgress:
    """The rows of one stage of many shards, as its shards tell of them, those that are under way included."""

    extent: StageExtent
    clock: Callable[[], float] = time.monotonic
    states: Counter[str] = field(default_factory=Counter)
    """Rows by state, of the shards that are done."""
    _flying: dict[str, tuple[dict[str, int], int]] = field(default_factory=dict)
    _done: set[str] = field(default_factory=set)
    _seen: deque[tuple[float, int, float]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.states.update(self.extent.states)
        self._seen.append((self.clock() - self.extent.ago, self.states.total(), 0.0))

    def told(self, shard: str, states: Mapping[str, int], rows: int) -> None:
        """States of the rows of a shard so far, of `rows` in all. One that is begun anew says fewer than before."""
        if shard not in self._done:  # words of a worker may come behind the driver's, who has the record
            self._flying[shard] = dict(states), rows
            self._note()

    def finished(self, shard: str, states: Mapping[str, int]) -> None:
        """A shard is done, and these are its states."""
        self._flying.pop(shard, None)
        if shard not in self._done:
            self._done.add(shard)
            self.states.update(states)
            self._note()

    @property
    def so_far(self) -> Counter[str]:
        """Rows by state, those of shards under way included."""
        total = Counter(self.states)
        for states, _ in self._flying.values():
            total.update(states)
        return total

    @property
    def done(self) -> int:
        """Shards that are done, those from before this run included."""
        return self.extent.present + len(self._done)

    def rate(self) -> float:
        """Rows per second over the last WINDOW_S seconds, or since the beginning if that is less."""
        now, (then, rows, _) = self.clock(), self._seen[0]
        return max(0.0, (self.so_far.total() - rows) / max(now - then, 1e-3))

    def left(self) -> float | None:
        """Seconds to go, at the pace of the last WINDOW_S seconds; None while nothing can be said."""
        now, (then, _, before) = self.clock(), self._seen[0]
        made = self._shares()
        pace = (made - before) / max(now - then, 1e-3)
        return max(0.0, self.extent.shards - self.extent.present - made) / pace if pace > 0 else None

    def values(self) -> dict[str, float]:
        """The figures of now, by their names as metrics."""
        states = self.so_far
        share = success_rate(states)
        known = {"shards": float(self.done), "rows": float(states.total()), "rows_per_s": self.rate()}
        return known | ({} if share is None else {"success_rate": share})

    def row(self) -> dict[str, Any]:
        """The figures of now, for a board."""
        values = self.values()
        return {
            "done": self.done,
            "total": self.extent.shards,
            "unit": "shards",
            "rate": values["rows_per_s"],
            "rows": int(values["rows"]),
            "success": values.get("success_rate"),
            "left": self.left(),
        }

    def _shares(self) -> float:
        """Shards done in this run, with the shares of those under way."""
        return len(self._done) + sum(
            min(1.0, sum(states.values()) / rows) for states, rows in self._flying.values() if rows
        )

    def _note(self) -> None:
        now = self.clock()
        self._seen.append((now, self.so_far.total(), self._shares()))
        while len(self._seen) > 2 and now - self._seen[1][0] > WINDOW_S:
            self._seen.popleft()


@dataclass
class ProgressBoard:
    """Stage → what is shown of it."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    accounts: dict[str, StageProgress] = field(default_factory=dict)

    def progress(self, stage: str, done: float, total: float, unit: str, rate: float | None) -> None:
        """A fit's steps, or what else a stage counts itself."""
        self.rows.setdefault(stage, {}).update(done=done, total=total, unit=unit, rate=rate)

    def metrics(self, stage: str, values: Mapping[str, float]) -> None:
        """A loss is shown, too."""
        if "loss" in values:
            self.rows.setdefault(stage, {"done": 0, "total": 0})["loss"] = values["loss"]

    def begin(self, stage: str, extent: StageExtent) -> None:
        """A stage of many shards begins."""
        self.accounts[stage] = StageProgress(extent)

    def shard(self, stage: str, shard: str, states: Mapping[str, int], rows: int, done: bool) -> None:
        """Rows of a shard by state: so far of `rows`, or (done) in the end."""
        if account := self.accounts.get(stage):
            if done:
                account.finished(shard, states)
            else:
                account.told(shard, states, rows)

    def finish(self, stage: str) -> None:
        """A stage of many shards has ended; what was known of it stays."""
        if account := self.accounts.pop(stage, None):
            self.rows[stage] = account.row()

    def shown(self) -> dict[str, dict[str, Any]]:
        """Stage → done, total, unit, rate and, as the case may be, loss, or rows, success (0 … 1) and seconds left."""
        return {**self.rows, **{stage: account.row() for stage, account in self.accounts.items()}}
