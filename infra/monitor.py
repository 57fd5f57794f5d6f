"""Where a run stands, told by whoever works on it: a progress board and a Tracker, in one Ray actor beside the driver.

Trainers and workers hold a `Monitor`, a small picklable handle whose methods send and never wait. The actor stays on
the driver's node, where the tracker's spool and an SQLite database lie, and takes no CPU from the work.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from infra.tracking import Tracker
from infra.tracking_uri import spool_folder

_OFTEN_S = 0.2


class Desk:
    """What the actor holds: the board, and the tracker."""

    def __init__(self, uri: str, experiment: str, run: str, about: dict[str, str]) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.tracker = Tracker(uri, experiment, spool_folder(uri), run, about)

    def progress(self, stage: str, done: float, total: float, unit: str, rate: float | None) -> None:
        row = self.rows.setdefault(stage, {})
        row.update(done=done, total=total, unit=unit, rate=rate)

    def start(self, stage: str, params: dict[str, Any], tags: dict[str, str]) -> None:
        self.tracker.start(stage, params, tags)

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
        if "loss" in values:
            self.rows.setdefault(stage, {"done": 0, "total": 0})["loss"] = values["loss"]
        self.tracker.metrics(stage, step, values)

    def artifact(self, stage: str, data: bytes, name: str) -> None:
        self.tracker.artifact(stage, data, name)

    def end(self, stage: str, status: str) -> None:
        self.tracker.end(stage, status)

    def board(self) -> dict[str, dict[str, Any]]:
        return self.rows

    def tracking(self) -> tuple[int, str]:
        return self.tracker.pending, self.tracker.trouble

    def close(self, timeout_s: float) -> bool:
        return self.tracker.close(timeout_s)


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
        actor = ray.remote(Desk).options(scheduling_strategy=here, **options)
        return cls(actor.remote(uri, experiment, run, {"unclip.store": store_uri}))

    def progress(self, stage: str, done: float, total: float, unit: str = "", rate: float | None = None) -> None:
        """done of total units; at most five a second are sent, and the last one always."""
        now = time.monotonic()
        if done >= total or now - self._told.get(stage, -_OFTEN_S) >= _OFTEN_S:
            self._told[stage] = now
            self._actor.progress.remote(stage, done, total, unit, rate)

    def start(self, stage: str, params: dict[str, Any], tags: dict[str, str]) -> None:
        """Begins a stage's MLflow run; tags["unclip.key"] is by what it is found again."""
        self._actor.start.remote(stage, params, tags)

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Values at a step; "loss" is shown on the board, too."""
        self._actor.metrics.remote(stage, step, values)

    def artifact(self, stage: str, data: Path | bytes, name: str) -> None:
        """A small file, a few MB at most, as `name` in the stage's MLflow run."""
        self._actor.artifact.remote(stage, data.read_bytes() if isinstance(data, Path) else data, name)

    def end(self, stage: str, status: str = "FINISHED") -> None:
        """Ends the stage's MLflow run: FINISHED, FAILED or KILLED."""
        self._actor.end.remote(stage, status)

    def board(self) -> dict[str, dict[str, Any]]:
        """Stage → done, total, unit, rate, loss, as last told. Waits for the actor; {} if it is being restarted."""
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
        self.rows: dict[str, dict[str, Any]] = {}

    def progress(self, stage: str, done: float, total: float, unit: str = "", rate: float | None = None) -> None:
        """As Monitor's."""
        self.rows.setdefault(stage, {}).update(done=done, total=total, unit=unit, rate=rate)

    def start(self, stage: str, params: dict[str, Any], tags: dict[str, str]) -> None:
        """As Monitor's; told to nobody."""

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
        """As Monitor's."""
        if "loss" in values:
            self.rows.setdefault(stage, {"done": 0, "total": 0})["loss"] = values["loss"]

    def artifact(self, stage: str, data: Path | bytes, name: str) -> None:
        """As Monitor's; told to nobody."""

    def end(self, stage: str, status: str = "FINISHED") -> None:
        """As Monitor's; told to nobody."""

    def board(self) -> dict[str, dict[str, Any]]:
        """As Monitor's."""
        return self.rows

    def flush(self, timeout_s: float = 30.0) -> bool:
        """As Monitor's: nothing ever waits."""
        return True
