"""What MLflow is told, without ever making anybody wait for it.

Each event is a line of a spool file; a thread writes them to MLflow, and tries again for as long as the server does
not answer. What a killed process left in its spool the next one catches up on. This is infra's only room of mlflow,
which is imported in that thread (it takes seconds).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from infra.errors import Refused
from infra.process import Process

log = logging.getLogger(__name__)

STATUSES = ("FINISHED", "FAILED", "KILLED")
_BATCH = 1000  # metrics that MLflow takes in one call
_VALUE = 6000  # characters that it takes in one parameter
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def default_uri(store_uri: str) -> str:
    """Where a store's runs are tracked when no server is named: SQLite in the store's folder.

    SQLite cannot lie in S3: for such a store it lies in the user's state folder, and is one however the URI is written.
    """
    if store_uri.startswith("s3://"):
        bucket, _, prefix = store_uri.removeprefix("s3://").partition("/")
        folder = _state() / "mlflow" / _short(f"s3://{bucket}/{prefix.strip('/')}".rstrip("/"))
    else:
        folder = Path(store_uri.removeprefix("file://")).expanduser().absolute() / "mlflow"
    return f"sqlite:///{folder / 'mlflow.db'}"


def database_folder(uri: str) -> Path | None:
    """The folder of an SQLite tracking database, None for any other URI."""
    return Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") else None


def spool_folder(uri: str) -> Path:
    """Where events for this tracking URI wait: beside an SQLite database, else in the user's state folder."""
    return (database_folder(uri) or _state() / "tracking" / _short(uri)) / "spool"


def check_server(uri: str, timeout_s: float = 5.0) -> None:
    """Refused, within seconds, if there is no MLflow server at an http(s) URI, or MLflow cannot use the URI."""
    scheme = urlsplit(uri).scheme
    if scheme.split("+")[0] in _DATABASES or scheme.startswith("databricks"):
        return
    if scheme not in ("http", "https"):
        raise Refused(
            f"MLFLOW_TRACKING_URI {uri!r}: use an MLflow server (http://host:5000) or a database (sqlite:///file.db)."
        )
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=timeout_s) as answer:
            answer.read(64)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise Refused(
            f"the MLflow server at {uri} does not answer ({reason}). Start it, correct MLFLOW_TRACKING_URI, or unset "
            "it to track in the store; with --set tracking.required=false the run starts, and MLflow catches up later."
        ) from error


def quiet() -> None:
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
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


def open_client(uri: str) -> Any:
    """An MlflowClient; a new SQLite database is made by one process at a time."""
    quiet()
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # mlflow sets its own levels when imported
        logging.getLogger(name).setLevel(logging.ERROR)
    folder = database_folder(uri)
    if folder is None:
        return MlflowClient(uri, registry_uri=uri)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        client = MlflowClient(uri, registry_uri=uri)
        client.search_experiments(max_results=1)  # makes the tables
        return client


class Tracker:
    """One parent run, `run`, and a child of it for each stage, in one experiment of an MLflow server or database.

    A child is found again by its tag `unclip.key`, so a fit that goes on goes on in the same MLflow run. A parent that
    its dead driver left running goes on too. No method waits for MLflow but `flush`, and none raises for its sake.
    """

    def __init__(self, uri: str, experiment: str, spool: Path, run: str = "run", about: dict[str, str] | None = None):
        """about: tags of the parent run; runs with equal tags and name continue each other."""
        self.uri, self.run = uri, run
        self._lock = threading.Condition()
        self._written = self._sent = 0
        self._closing = False
        self._told = ""
        self._folder = spool
        spool.mkdir(parents=True, exist_ok=True)
        me = Process.this()
        self._file = spool / f"{me.host}~{me.pid}~{me.started}~{uuid.uuid4().hex[:8]}.jsonl"
        tags = {**(about or {}), "unclip.run": run}
        self._put("open", name=run, experiment=experiment, tags=tags, holder=json.dumps(asdict(me), sort_keys=True))
        self._thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self._thread.start()

    def start(self, stage: str, params: dict[str, Any], tags: dict[str, str]) -> None:
        """Begins (or continues) a stage's run. params may be nested; they become dotted names."""
        self._put("start", stage=stage, params=dict(_flat(params)), tags={name: str(tags[name]) for name in tags})

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Values at a step."""
        self._put("metrics", stage=stage, step=step, values={name: float(value) for name, value in values.items()})

    def artifact(self, stage: str, data: Path | bytes, name: str) -> None:
        """A small file, kept beside the run as `name` ("grids/last.png"). stage "" is the parent."""
        copy = self._folder / uuid.uuid4().hex / Path(name).name
        copy.parent.mkdir(parents=True)
        if isinstance(data, Path):
            shutil.copyfile(data, copy)
        else:
            copy.write_bytes(data)
        self._put("artifact", stage=stage, file=str(copy), folder=str(Path(name).parent))

    def end(self, stage: str, status: str = "FINISHED") -> None:
        """Ends a stage's run, FINISHED, FAILED or KILLED; stage "" is the parent."""
        if status not in STATUSES:
            raise Refused(f"a run ends as one of {', '.join(STATUSES)}, not {status!r}")
        self._put("end", stage=stage, status=status)

    @property
    def pending(self) -> int:
        """Events that MLflow has not been told yet."""
        return self._written - self._sent

    @property
    def trouble(self) -> str:
        """Why MLflow cannot be told just now; empty if it can."""
        return self._told

    def flush(self, timeout_s: float) -> bool:
        """Waits until MLflow knows all; False if it does not within that time."""
        with self._lock:
            return self._lock.wait_for(lambda: self.pending == 0, timeout_s)

    def close(self, timeout_s: float = 10.0) -> bool:
        """Flushes and ends the thread; what is left stays in the spool, for the next tracker. False if some is."""
        done = self.flush(timeout_s)
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        self._thread.join(timeout_s)
        return done

    def _put(self, do: str, **fields: Any) -> None:
        line = json.dumps({"do": do, "time": round(time.time() * 1000), **fields}) + "\n"
        with self._lock:
            with open(self._file, "a") as file:
                file.write(line)
            self._written += 1
            self._lock.notify_all()

    def _deliver(self) -> None:
        """The thread: first what others left, then our own, in order; an event that cannot be told blocks the rest."""
        for left in _left_behind(self._folder):
            if not self._file_to_mlflow(left, lambda: True):
                return
        self._file_to_mlflow(self._file, lambda: self._closing, self._count)

    def _count(self, events: int) -> None:
        with self._lock:
            self._sent += events
            self._lock.notify_all()

    def _file_to_mlflow(
        self, path: Path, ended: Callable[[], bool], count: Callable[[int], None] = lambda events: None
    ) -> bool:
        """Tells MLflow every event of a spool file, until `ended` and nothing is left. False: given up, closing."""
        place = path.with_suffix(".place")
        at = int(place.read_text() or 0) if place.exists() else 0
        writer: _Writer | None = None
        waited = 0.1
        seen = b""  # of the file before `at`: what a writer must know to go on
        while True:
            with open(path, "rb") as file:
                if writer is None:
                    seen = file.read(at)
                file.seek(at)
                data = file.read()
            lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
            if not lines:
                if ended():
                    place.unlink(missing_ok=True)
                    path.unlink()
                    return True
                with self._lock:
                    self._lock.wait(1.0)
                continue
            try:
                if writer is None:
                    writer = _Writer(self.uri)
                    for line in seen.splitlines():
                        writer.remember(json.loads(line))
                told = writer.tell([json.loads(line) for line in lines])
            except Exception as error:  # noqa: BLE001  whatever MLflow's stores raise: keep the events, try again
                if not self._told:
                    log.warning("MLflow at %s cannot be told now (%s); events wait in %s", self.uri, error, path)
                self._told, writer = f"{type(error).__name__}: {error}", None
                with self._lock:
                    self._lock.wait_for(lambda: self._closing, waited)
                    if self._closing:
                        return False
                waited = min(waited * 2, 5.0)
                continue
            self._told, waited = "", 0.1
            at += sum(map(len, lines[:told]))
            place.write_text(str(at))
            count(told)


class _Writer:
    """Speaks to MLflow. Every call may be repeated: runs are found by key, metrics carry their time."""

    def __init__(self, uri: str) -> None:
        self.uri, self.client = uri, open_client(uri)
        self.runs: dict[str, str] = {}
        self.keys: dict[str, dict[str, Any]] = {}
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

    def _metrics(self, events: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, event["time"], event["step"])
            for event in events
            for name, value in event["values"].items()
        ]
        for first in range(0, len(metrics), _BATCH):
            self.client.log_batch(self._run(events[0]["stage"]), metrics=metrics[first : first + _BATCH])

    def _artifact(self, events: list[dict[str, Any]]) -> None:
        (event,) = events
        if Path(event["file"]).exists():
            folder = None if event["folder"] == "." else event["folder"]
            self.client.log_artifact(self._run(event["stage"]), event["file"], folder)
            shutil.rmtree(Path(event["file"]).parent, ignore_errors=True)

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
            place = (folder / "artifacts" / _short(name)).as_uri() if folder else None
            return self.client.create_experiment(name, place)
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return found.experiment_id


def _left_behind(spool: Path) -> Iterator[Path]:
    """Spool files of dead processes of this host, each claimed for this process by a rename (one claimant gets it)."""
    me = Process.this()
    for path in sorted(spool.glob("*.jsonl")):
        parts = path.stem.split("~")
        if len(parts) != 4 or not parts[1].isdigit() or not Process(parts[0], int(parts[1]), parts[2]).dead():
            continue
        claimed = spool / f"{me.host}~{me.pid}~{me.started}~{parts[3]}.jsonl"
        try:
            os.rename(path, claimed)
        except FileNotFoundError:
            continue
        if path.with_suffix(".place").exists():
            os.rename(path.with_suffix(".place"), claimed.with_suffix(".place"))
        yield claimed


def _flat(params: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "\\'") + "'"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _state() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "unclip"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
