"""Starts a fit: on Ray Train, which launches, restarts and resizes it and owns no state; or in this very process.

The only room of Ray on this floor. Each start of the loop takes the newest valid checkpoint in the store, so Ray's own
resume, which goes by the run's name, is kept out by a new name each time.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import Refused, Stopped
from infra.store import Store, open_store
from training.checkpoint import Checkpoints, deliver_model
from training.job import FitHow, Job
from training.preemption import Draining, StopFlag, handle_sigterm
from unclip.errors import Refused as Impossible

if TYPE_CHECKING:
    from training.telemetry import Monitor

__all__ = ["FitHow", "Job", "discard", "fit", "request_stop", "train_local"]

RESIZE_SECONDS = 30.0
"""How often a fit with fewer workers than it wants looks whether the cluster has room for more."""
SETTINGS = {
    # The controller looks at its workers this often, so a fit ends that much later.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A watcher costs a process a fit, and a preempted worker resumes from its checkpoint like any other.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Ray Train's settings, unless the environment has others."""


def fit(job: Job, how: FitHow, store_uri: str, out: Path, monitor: Monitor, lease_number: int) -> dict[str, Any]:
    """Fits a model on Ray Train, writes it to `out` and returns the facts of its record.

    Blocks, and may run in any thread; Ray is initialised. monitor is picklable and goes to the workers. The caller
    holds the lease of that number on `job.key`. A finished model that nobody took is delivered without starting Ray
    Train. Raises Refused for what training refuses, and with code 5 if workers died more than `max_failures` times;
    Stopped if a stop was requested.
    """
    store = open_store(store_uri)
    if (facts := deliver_model(store, job, out)) is not None:
        return facts
    try:
        _ray_train(job, how, store_uri, monitor, lease_number)
    finally:
        store.delete(_stop_name(job.key, lease_number))
    return _delivered(store, job, out)


def train_local(
    job: Job,
    how: FitHow,
    store: Store,
    out: Path,
    monitor: Monitor,
    *,
    lease_number: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """The same fit in this process, without Ray, by one worker; raises Stopped if `stop` said so."""
    from training.loop import train

    train(job, how, store, monitor, lease=lease_number, stop=stop)
    return _delivered(store, job, out)


def request_stop(store: Store, key: str, lease_number: int) -> None:
    """Asks the fit that runs under that lease to save and stop, which it does within seconds and a step."""
    store.put_new(_stop_name(key, lease_number), b"stop")


def discard(store: Store, key: str) -> None:
    """Removes a fit's checkpoints, once its record is committed."""
    Checkpoints(store, key).discard()


def _delivered(store: Store, job: Job, out: Path) -> dict[str, Any]:
    facts = deliver_model(store, job, out)
    if facts is None:
        raise Refused(f"{job.stage} ended without a finished model under checkpoints/{job.key}/", code=5)
    return facts


def _stop_name(key: str, lease_number: int) -> str:
    return f"checkpoints/{key}/stop-{lease_number}"


def _ray_train(job: Job, how: FitHow, store_uri: str, monitor: Monitor, lease_number: int) -> None:
    for variable, value in SETTINGS.items():
        os.environ.setdefault(variable, value)
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    with tempfile.TemporaryDirectory(prefix="unclip-train-") as folder:
        trainer = _trainer(alone=how.workers == 1 and not how.gpus)(
            _worker,
            train_loop_config={"job": job, "how": how, "store": store_uri, "monitor": monitor, "lease": lease_number},
            scaling_config=ScalingConfig(
                num_workers=(how.least_workers, how.workers) if how.least_workers else how.workers,
                elastic_resize_monitor_interval_s=RESIZE_SECONDS,
                use_gpu=how.gpus > 0,
                resources_per_worker={"CPU": how.cpus, **({"GPU": how.gpus} if how.gpus else {})},
            ),
            run_config=RunConfig(
                name=f"{job.stage}-{uuid.uuid4().hex[:12]}",
                storage_path=folder,
                failure_config=FailureConfig(max_failures=how.max_failures),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            refused = trainer.fit().return_value
        except TrainingFailedError as error:
            raise _failure(job, error) from error
    if refused:
        raise refused


def _trainer(*, alone: bool) -> Any:
    """Ray Train's trainer without what we never use, since each part is a process that imports for seconds.

    Left out: the manager of Ray datasets (we read blocks), and the detached cleaner of placement groups (they go with
    the driver's job). A worker that is alone on a CPU needs no process group, so nobody but itself imports torch.
    Added: every worker heeds SIGTERM.
    """
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    if alone:
        base: Any = DataParallelTrainer
    else:
        from ray.train.torch import TorchTrainer as base

    class HeedSigterm(WorkerGroupCallback):
        def after_worker_group_start(self, worker_group: Any) -> None:
            worker_group.execute(handle_sigterm)  # in each one's main thread: no other may

    class Trainer(base):
        def _create_default_callbacks(self) -> list[Any]:
            unused = (DatasetsCallback, PlacementGroupCleanerCallback)
            used = [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]
            return [*used, HeedSigterm()]

    return Trainer


def _failure(job: Job, error: BaseException) -> Refused:
    """How the workers failed, each way once."""
    failures = getattr(error, "worker_failures", {}).values()
    causes = [getattr(failure, "_base_exc", failure) for failure in failures]
    told = "; ".join(dict.fromkeys(f"{type(cause).__name__}: {cause}" for cause in causes)) or str(error)
    return Refused(f"{job.stage} failed: {told}", code=5)


def _worker(config: dict[str, Any]) -> Refused | None:
    """What runs in each of Ray Train's workers; returns what was refused, or that it was stopped.

    Ray Train would start again a worker that raised. So a worker returns what it alone, or every rank at the same step,
    refused; a rank that returned by itself would leave the others waiting for it, so there it raises. All raise, too,
    where they stopped for a SIGTERM of one of them and not for the driver: then they are to be started again.
    """
    import ray
    import ray.train
    import torch

    from training.loop import train
    from training.optim import Diverged
    from training.parallel import Group

    context, how = ray.train.get_context(), config["how"]
    store, job = open_store(config["store"]), config["job"]
    group = Group(context.get_world_rank(), context.get_world_size())
    device = torch.device("cuda", torch.cuda.current_device()) if how.gpus else torch.device("cpu")
    stop = StopFlag(store, _stop_name(job.key, config["lease"]))
    draining = Draining(_draining_nodes, ray.get_runtime_context().get_node_id())
    if how.nice:
        os.nice(how.nice)
    try:
        train(
            job,
            how,
            store,
            config["monitor"],
            lease=config["lease"],
            group=group,
            device=device,
            stop=stop,
            save=draining,
        )
    except (Refused, Impossible) as error:
        if isinstance(error, Stopped) and not stop.requested():
            raise
        if group.ranks > 1 and not isinstance(error, (Stopped, Diverged)):
            raise
        return error if isinstance(error, Refused) else Refused(str(error), code=5)
    return None


def _draining_nodes() -> dict[str, int]:
    """The nodes that are about to be taken away, by id; none where the cluster's head does not say."""
    from ray._private.state import state
    from ray.exceptions import RayError

    try:
        return state.get_draining_nodes()
    except RayError:
        return {}
