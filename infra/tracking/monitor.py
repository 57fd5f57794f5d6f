"""The monitor: a progress board and a tracker in one Ray actor beside the driver, which workers and trainers send to.

Trainers and workers hold a `Monitor`, a small picklable handle whose methods send and never wait. The actor stays on
the driver's node, where the tracker's spool and an SQLite database lie, and takes no CPU from the work. What the board
says of stages of many shards goes to MLflow and to Ray's metrics endpoint as well.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.tracking.board import ProgressBoard, StageExtent
from infra.tracking.tracker import DataSet, Tracker
from infra.tracking.uri import spool_folder

_OFTEN_S = 0.2
_METRICS_S = 1.0
"""Figures of a stage of many shards go to MLflow and Ray at most this often, and at its end."""


class MonitorActor:
    """What the actor holds: the board, the tracker, and the figures that Ray exports."""

    def __init__(self, uri: str, experiment: str, run: str, about: dict[str, str]) -> None:
        self._board = ProgressBoard()
        self.tracker = Tracker(uri, experiment, spool_folder(uri), run, about)
        self.exported = MetricsExporter()
        self._told: dict[str, float] = {}

    def progress(self, stage: str, done: float, total: float, unit: str, rate: float | None) -> None:
        self._board.progress(stage, done, total, unit, rate)

    def begin(
        self, stage: str, extent: StageExtent, params: dict[str, Any], tags: dict[str, str], data: Sequence[DataSet]
    ) -> None:
        self.tracker.start(stage, params, tags, data)
        self._board.begin(stage, extent)
        self.exported.figures(stage, self._board.accounts[stage].values())

    def shard(self, stage: str, shard: str, states: dict[str, int], rows: int, done: bool) -> None:
        account = self._board.accounts.get(stage)
        if account is None:  # late words of a stage that has ended, or this actor was started anew
            return
        before = account.done
        self._board.shard(stage, shard, states, rows, done)
        if account.done > before:
            self.exported.rows(stage, states)
        now = time.monotonic()
        if now - self._told.get(stage, -_METRICS_S) >= _METRICS_S:
            self._told[stage] = now
            self._figures(stage)

    def finish(self, stage: str, status: str) -> None:
        """The last figures, and how many rows ended in each state."""
        account = self._board.accounts.get(stage)
        if account is None:
            return
        self._figures(stage)
        self._board.finish(stage)
        states = {f"rows.{state}": float(count) for state, count in account.states.items()}
        self.tracker.metrics(stage, account.done, states)
        self.tracker.end(stage, status)
        self.exported.figures(stage, {"rows_per_s": 0.0})

    def _figures(self, stage: str) -> None:
        account = self._board.accounts[stage]
        values = account.values()
        self.tracker.metrics(stage, account.done, values)
        self.exported.figures(stage, values)

    def start(self, stage: str, params: dict[str, Any], tags: dict[str, str], data: Sequence[DataSet]) -> None:
        self.tracker.start(stage, params, tags, data)

    def tag(self, stage: str, tags: dict[str, str]) -> None:
        self.tracker.tag(stage, tags)

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
        self._board.metrics(stage, values)
        self.tracker.metrics(stage, step, values, once=True)

    def artifact(self, stage: str, data: bytes, name: str) -> None:
        self.tracker.artifact(stage, data, name)

    def image(self, stage: str, data: bytes, name: str, step: int) -> None:
        self.tracker.image(stage, data, name, step)

    def end(self, stage: str, status: str) -> None:
        self.tracker.end(stage, status)

    def board(self) -> dict[str, dict[str, Any]]:
        return self._board.shown()

    def tracking(self) -> tuple[int, str]:
        return self.tracker.pending, self.tracker.trouble

    def close(self, timeout_s: float) -> bool:
        return self.tracker.close(timeout_s)


class MetricsExporter:
    """What Ray's metrics endpoint says of stages of many shards; Ray puts `ray_` before each name.

    Gauges `unclip_shards`, `unclip_rows_per_s` and `unclip_success_rate` by stage, of now; counter `unclip_rows` by
    stage and reason (the state that rows ended in), of shards that were done.
    """

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge

        self._counter = Counter(
            "unclip_rows", "Rows of finished shards, by the state they ended in", ("stage", "reason")
        )
        told = {
            "shards": "Shards that are done",
            "rows_per_s": "Rows per second, over the last half minute",
            "success_rate": "Share of rows with which the stage succeeded, 0 to 1",
        }
        self._gauges = {name: Gauge(f"unclip_{name}", text, ("stage",)) for name, text in told.items()}

    def figures(self, stage: str, values: dict[str, float]) -> None:
        """The figures of now."""
        for name, gauge in self._gauges.items():
            if name in values:
                gauge.set(values[name], {"stage": stage})

    def rows(self, stage: str, states: dict[str, int]) -> None:
        """Rows of a shard that was done, by state."""
        for state, count in states.items():
            if count:
                self._counter.inc(count, {"stage": stage, "reason": state})


class Monitor:
    """The handle. `stage` is the stage's name; "" is the run as a whole."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._told: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_actor": self._actor, "_told": {}}

    @classmethod
    def launch(cls, uri: str, experiment: str, run: str, store_uri: str) -> Monitor:
        """Starts the actor on this node. uri: MLflow's. A run of equal name and store that died is continued."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: dict[str, Any] = {"name": f"monitor-{uuid.uuid4().hex[:12]}", "num_cpus": 0, "max_restarts": -1}
        actor = ray.remote(MonitorActor).options(scheduling_strategy=here, **options)
        return cls(actor.remote(uri, experiment, run, {"unclip.store": store_uri}))

    def progress(self, stage: str, done: float, total: float, unit: str = "", rate: float | None = None) -> None:
        """done of total units; at most five a second are sent, and the last one always."""
        now = time.monotonic()
        if done >= total or now - self._told.get(stage, -_OFTEN_S) >= _OFTEN_S:
            self._told[stage] = now
            self._actor.progress.remote(stage, done, total, unit, rate)

    def start(self, stage: str, params: dict[str, Any], tags: dict[str, str], data: Sequence[DataSet] = ()) -> None:
        """Begins a stage's MLflow run; tags["unclip.key"] is by what it is found again. data: what it reads."""
        self._actor.start.remote(stage, params, tags, data)

    def begin(
        self,
        stage: str,
        extent: StageExtent,
        params: dict[str, Any],
        tags: dict[str, str],
        data: Sequence[DataSet] = (),
    ) -> None:
        """Begins a stage of many shards; in MLflow as `start` does."""
        self._actor.begin.remote(stage, extent, params, tags, data)

    def tag(self, stage: str, tags: dict[str, str]) -> None:
        """Tags of the stage's MLflow run, new or in place of others."""
        self._actor.tag.remote(stage, tags)

    def shard(self, stage: str, shard: str, states: Mapping[str, int], rows: int = 0, done: bool = False) -> None:
        """Rows of a shard by state: so far of `rows`, or (done) in the end; in MLflow, metrics by shards done."""
        self._actor.shard.remote(stage, shard, dict(states), rows, done)

    def finish(self, stage: str, status: str = "FINISHED") -> None:
        """Ends what `begin` began: FINISHED, FAILED or KILLED."""
        self._actor.finish.remote(stage, status)

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Values at a step; "loss" is shown on the board, too. What MLflow has at this step or a later one stays: a fit
        that goes on from a checkpoint does some steps again."""
        self._actor.metrics.remote(stage, step, values)

    def artifact(self, stage: str, data: Path | bytes, name: str) -> None:
        """A small file, a few MB at most, as `name` in the stage's MLflow run."""
        self._actor.artifact.remote(stage, data.read_bytes() if isinstance(data, Path) else data, name)

    def image(self, stage: str, data: bytes, name: str, step: int) -> None:
        """A picture (PNG) at a step, one of a series of that name."""
        self._actor.image.remote(stage, data, name, step)

    def end(self, stage: str, status: str = "FINISHED") -> None:
        """Ends the stage's MLflow run: FINISHED, FAILED or KILLED."""
        self._actor.end.remote(stage, status)

    def board(self) -> dict[str, dict[str, Any]]:
        """`Board.shown` of what was last told. Waits for the actor; {} if it is being restarted."""
        import ray

        try:
            return ray.get(self._actor.board.remote(), timeout=5)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return {}

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Waits until MLflow knows all that was sent; False if it does not within that time."""
        import ray

        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            pending, _ = ray.get(self._actor.tracking.remote())
            if not pending:
                return True
            time.sleep(0.1)
        return False

    def trouble(self) -> str:
        """Why MLflow cannot be told just now; empty if it can."""
        import ray

        return ray.get(self._actor.tracking.remote())[1]

    def close(self, timeout_s: float = 20.0) -> bool:
        """Ends the run and the actor; False if MLflow does not know all yet (it waits in the spool)."""
        import ray

        try:
            return ray.get(self._actor.close.remote(timeout_s), timeout=timeout_s * 2 + 5)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return False
        finally:
            ray.kill(self._actor)


class NullMonitor:
    """The same methods without Ray and MLflow, for a fit in this very process; it keeps what it was last told."""

    def __init__(self) -> None:
        self._board = ProgressBoard()

    def progress(self, stage: str, done: float, total: float, unit: str = "", rate: float | None = None) -> None:
        """As Monitor's."""
        self._board.progress(stage, done, total, unit, rate)

    def start(self, stage: str, params: dict[str, Any], tags: dict[str, str], data: Sequence[DataSet] = ()) -> None:
        """As Monitor's; told to nobody."""

    def begin(
        self,
        stage: str,
        extent: StageExtent,
        params: dict[str, Any],
        tags: dict[str, str],
        data: Sequence[DataSet] = (),
    ) -> None:
        """As Monitor's."""
        self._board.begin(stage, extent)

    def tag(self, stage: str, tags: dict[str, str]) -> None:
        """As Monitor's; told to nobody."""

    def shard(self, stage: str, shard: str, states: Mapping[str, int], rows: int = 0, done: bool = False) -> None:
        """As Monitor's."""
        self._board.shard(stage, shard, states, rows, done)

    def finish(self, stage: str, status: str = "FINISHED") -> None:
        """As Monitor's."""
        self._board.finish(stage)

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
        """As Monitor's."""
        self._board.metrics(stage, values)

    def artifact(self, stage: str, data: Path | bytes, name: str) -> None:
        """As Monitor's; told to nobody."""

    def image(self, stage: str, data: bytes, name: str, step: int) -> None:
        """As Monitor's; told to nobody."""

    def end(self, stage: str, status: str = "FINISHED") -> None:
        """As Monitor's; told to nobody."""

    def board(self) -> dict[str, dict[str, Any]]:
        """As Monitor's."""
        return self._board.shown()

    def flush(self, timeout_s: float = 30.0) -> bool:
        """As Monitor's: nothing ever waits."""
        return True
