"""How MLflow is told: a client, and events as calls to it. infra's only room of mlflow.

It is imported inside the functions, which takes seconds; `tracking.py` calls them in a thread.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.process import Process
from infra.tracking.uri import database_folder, short_digest

log = logging.getLogger(__name__)

_CHATTER = ("mlflow", "alembic", "urllib3.connectionpool")  # the last one warns of each call to a server that is gone
_BATCH = 1000  # metrics that MLflow takes in one call
_VALUE = 6000  # characters that it takes in one parameter
_DIGEST = 36  # and in the digest of a data set
_AGAIN_S = (0.5, 2.0)  # seconds after which a file that it would not take is tried again


def configure_mlflow() -> None:
    """Before mlflow is imported: no telemetry, no chatter, and failing requests fail soon (we try again ourselves)."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)
    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.ERROR)


def open_client(uri: str) -> Any:
    """An MlflowClient; a new SQLite database is made by one process at a time."""
    configure_mlflow()
    from mlflow import MlflowClient

    for name in _CHATTER:  # mlflow sets its own levels when imported
        logging.getLogger(name).setLevel(logging.ERROR)
    folder = database_folder(uri)
    if folder is None:
        return MlflowClient(uri, registry_uri=uri)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        client = MlflowClient(uri, registry_uri=uri)
        client.search_experiments(max_results=1)  # makes the tables
        return client


class Writer:
    """Speaks to MLflow. Every call may be repeated: runs are found by key, metrics carry their time."""

    def __init__(self, uri: str) -> None:
        self.uri, self.client = uri, open_client(uri)
        self.runs: dict[str, str] = {}
        self.keys: dict[str, dict[str, Any]] = {}
        self.steps: dict[str, dict[str, int]] = {}
        """By run, the last step of each metric that MLflow has, of those that are told once."""
        self.opened: dict[str, Any] = {}
        self.experiment = ""

    def remember(self, event: dict[str, Any]) -> None:
        """An event that MLflow knows already, of which later ones depend."""
        if event["do"] == "open":
            self.opened = event
        elif event["do"] == "start":
            self.keys[event["stage"]] = event
            self.runs.pop(event["stage"], None)

    def tell(self, events: list[dict[str, Any]]) -> int:
        """Tells the first event, and those behind it that fit into the same call. Returns how many that were."""
        from mlflow.exceptions import MlflowException

        same = 1
        if events[0]["do"] == "metrics":
            size = len(events[0]["values"])
            for event in events[1:]:
                if event["do"] != "metrics" or event["stage"] != events[0]["stage"]:
                    break
                size += len(event["values"])
                if size > _BATCH:
                    break
                same += 1
        try:
            getattr(self, "_" + events[0]["do"])(events[:same])
        except MlflowException as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST"):
                raise
            log.warning("MLflow will not have %s: %s", events[0]["do"], error)  # and never will
        return same

    def _open(self, events: list[dict[str, Any]]) -> None:
        self.remember(events[0])
        self.runs.clear()
        self._run("")

    def _start(self, events: list[dict[str, Any]]) -> None:
        from mlflow.entities import Param

        (event,) = events
        self.remember(event)
        run = self._run(event["stage"])
        params = [Param(name, str(value)[:_VALUE]) for name, value in event["params"].items()]
        known = self.client.get_run(run).data.params
        for first in range(0, len(params), 100):
            new = [param for param in params[first : first + 100] if param.key not in known]
            self.client.log_batch(run, params=new)
        if data := event.get("data"):
            self.client.log_inputs(run, [_data_set(one) for one in data])

    def _tag(self, events: list[dict[str, Any]]) -> None:
        (event,) = events
        for name, value in event["tags"].items():
            self.client.set_tag(self._run(event["stage"]), name, value)

    def _metrics(self, events: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        run = self._run(events[0]["stage"])
        once = any(event.get("once") for event in events)
        last = dict(self._last_steps(run)) if once else {}
        metrics = []
        for event in events:
            for name, value in event["values"].items():
                if event.get("once"):
                    if event["step"] <= last.get(name, -1):
                        continue
                    last[name] = event["step"]
                metrics.append(Metric(name, value, event["time"], event["step"]))
        for first in range(0, len(metrics), _BATCH):
            self.client.log_batch(run, metrics=metrics[first : first + _BATCH])
        if once:
            self.steps[run] = last

    def _last_steps(self, run: str) -> dict[str, int]:
        """The last step of each of a run's metrics."""
        if run not in self.steps:
            known = self.client.get_run(run).data.to_proto().metrics
            self.steps[run] = {metric.key: metric.step for metric in known}
        return self.steps[run]

    def _artifact(self, events: list[dict[str, Any]]) -> None:
        (event,) = events
        run, folder = self._run(event["stage"]), None if event["folder"] == "." else event["folder"]
        self._file(run, event["file"], lambda: self.client.log_artifact(run, event["file"], folder))

    def _image(self, events: list[dict[str, Any]]) -> None:
        from PIL import Image

        (event,) = events
        run, name, step = self._run(event["stage"]), event["name"], event["step"]

        def log() -> None:
            there = [file.path for file in self.client.list_artifacts(run, "images")]
            if any(path.startswith(f"images/{name}+step+{step}+") and path.endswith(".webp") for path in there):
                return  # a fit that goes on from a checkpoint drew it again
            with Image.open(event["file"]) as image:
                self.client.log_image(run, image, key=name, step=step, timestamp=event["time"])

        self._file(run, event["file"], log)

    def _file(self, run: str, file: str, log_file: Callable[[], None]) -> None:
        """Tells MLflow a file and removes it. One that it cannot keep, though it answers, is given up: where artifacts
        lie may be closed to this machine, and metrics are not to wait for that."""
        if not Path(file).exists():
            return
        for wait in (*_AGAIN_S, None):
            try:
                log_file()
                break
            except Exception as error:  # noqa: BLE001  whatever MLflow's places for artifacts raise
                self.client.get_run(run)  # raises where it is the server that is gone
                if wait is None:
                    log.warning("MLflow could not keep %s (%s)", Path(file).name, error)
                else:
                    time.sleep(wait)
        shutil.rmtree(Path(file).parent, ignore_errors=True)

    def _end(self, events: list[dict[str, Any]]) -> None:
        (event,) = events
        self.client.set_terminated(self._run(event["stage"]), event["status"], event["time"])

    def _run(self, stage: str) -> str:
        """The MLflow id of a stage's run ("": the parent), found or made, and running."""
        if stage not in self.runs:
            self.runs[stage] = self._child(stage) if stage else self._parent()
        return self.runs[stage]

    def _parent(self) -> str:
        """Goes on in a run that its driver, dead on this host, left running; else a new one."""
        tags = self.opened["tags"]
        self.experiment = self._experiment(self.opened["experiment"])
        wanted = " and ".join(f"tags.`{name}` = {_quoted(value)}" for name, value in sorted(tags.items()))
        for run in self.client.search_runs([self.experiment], f"attributes.status = 'RUNNING' and {wanted}"):
            holder = run.data.tags.get("unclip.holder", "")
            if holder == self.opened["holder"] or (holder and Process(**json.loads(holder)).dead()):
                self.client.set_tag(run.info.run_id, "unclip.holder", self.opened["holder"])
                return run.info.run_id
        tags = {**tags, "unclip.holder": self.opened["holder"], "mlflow.runName": self.opened["name"]}
        return self.client.create_run(self.experiment, self.opened["time"], tags).info.run_id

    def _child(self, stage: str) -> str:
        parent = self._run("")
        event = self.keys.get(stage, {"tags": {}, "time": self.opened["time"]})
        key = event["tags"].get("unclip.key") or f"{parent}/{stage}"
        tags = {**event["tags"], "unclip.key": key, "unclip.stage": stage, "mlflow.parentRunId": parent}
        found = self.client.search_runs([self.experiment], f"tags.`unclip.key` = {_quoted(key)}", max_results=1)
        if found:
            run = found[0].info.run_id
            for name, value in tags.items():
                if found[0].data.tags.get(name) != value:
                    self.client.set_tag(run, name, value)
            if found[0].info.status != "RUNNING":
                self.client.update_run(run, "RUNNING")
            return run
        return self.client.create_run(self.experiment, event["time"], {**tags, "mlflow.runName": stage}).info.run_id

    def _experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            folder = database_folder(self.uri)
            place = (folder / "artifacts" / short_digest(name)).as_uri() if folder else None
            return self.client.create_experiment(name, place)
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return found.experiment_id


def _data_set(about: dict[str, Any]) -> Any:
    """A `tracking.DataSet` as MLflow's own. Its digests have 36 digits at most; the tag `version` says all of it."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    kind = "s3" if about["uri"].startswith("s3://") else "local"
    source, profile = json.dumps({"uri": about["uri"]}), json.dumps(about["profile"])
    found = Dataset(about["name"], about["version"][:_DIGEST], kind, source, profile=profile)
    tags = {"mlflow.data.context": about["role"], "version": about["version"]}
    return DatasetInput(found, [InputTag(name, value) for name, value in tags.items()])


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "\\'") + "'"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
