"""Sends events to MLflow without ever making anybody wait: a spool file first, a thread behind it.

Each event is a line of a spool file; a thread writes them to MLflow, and tries again for as long as the server does
not answer. What a killed process left in its spool the next one catches up on.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infra.errors import Refused
from infra.process import Process
from infra.tracking.mlflow import Writer

log = logging.getLogger(__name__)

STATUSES = ("FINISHED", "FAILED", "KILLED")


@dataclass(frozen=True)
class DataSet:
    """A version of data that a run reads, as MLflow lists it under the run and finds runs by it."""

    name: str
    """The stage that made it."""
    version: str
    """Its manifest's SHA-256."""
    uri: str
    """Where the list of its files lies, a path or s3://…"""
    role: str
    """What it is to whoever reads it: rows, selection, …"""
    profile: dict[str, Any]
    """What is in it, such as rows and states."""


class Tracker:
    """One parent run, `run`, and a child of it for each stage, in one experiment of an MLflow server or database.

    A child is found again by its tag `unclip.key`, so a fit that goes on goes on in the same MLflow run. A parent that
    its dead driver left running goes on too. No method waits for MLflow but `flush`, and none raises for its sake, nor
    for want of room on the disk: events then wait in memory, and files are left out.
    """

    def __init__(self, uri: str, experiment: str, spool: Path, run: str = "run", about: dict[str, str] | None = None):
        """about: tags of the parent run; runs with equal tags and name continue each other."""
        self.uri, self.run = uri, run
        self._lock = threading.Condition()
        self._written = self._sent = 0
        self._closing = False
        self._told = ""
        self._held: deque[bytes] = deque()
        """Events that the disk has not taken yet."""
        self._full = ""
        self._folder = spool
        spool.mkdir(parents=True, exist_ok=True)
        me = Process.this()
        self._file = spool / f"{me.host}~{me.pid}~{me.started}~{uuid.uuid4().hex[:8]}.jsonl"
        self._file.touch()
        tags = {**(about or {}), "unclip.run": run}
        self._put("open", name=run, experiment=experiment, tags=tags, holder=json.dumps(asdict(me), sort_keys=True))
        self._thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self._thread.start()

    def start(self, stage: str, params: dict[str, Any], tags: dict[str, str], data: Sequence[DataSet] = ()) -> None:
        """Begins (or continues) a stage's run. params may be nested; they become dotted names, and stay what they were
        where the run goes on. data: what it reads."""
        texts = {name: str(tags[name]) for name in tags}
        self._put("start", stage=stage, params=dict(_flat(params)), tags=texts, data=[asdict(one) for one in data])

    def tag(self, stage: str, tags: dict[str, str]) -> None:
        """Tags of a stage's run, new or in place of those of the same names; stage "" is the parent."""
        self._put("tag", stage=stage, tags={name: str(tags[name]) for name in tags})

    def metrics(self, stage: str, step: int, values: dict[str, float], *, once: bool = False) -> None:
        """Values at a step; `once`: where the run has a metric at this step or a later one already, that one stays."""
        numbers = {name: float(value) for name, value in values.items()}
        self._put("metrics", stage=stage, step=step, values=numbers, once=once)

    def artifact(self, stage: str, data: Path | bytes, name: str) -> None:
        """A small file, kept beside the run as `name` ("grids/last.png"). stage "" is the parent."""
        if (copy := self._copied(data, name)) is not None:
            self._put("artifact", stage=stage, file=copy, folder=str(Path(name).parent))

    def image(self, stage: str, data: Path | bytes, name: str, step: int) -> None:
        """A picture at a step, of which MLflow shows all of one name (letters, digits and spaces) as a series."""
        if (copy := self._copied(data, f"{name}.png")) is not None:
            self._put("image", stage=stage, file=copy, name=name, step=step)

    def _copied(self, data: Path | bytes, name: str) -> str | None:
        """A copy that lies beside the spool until MLflow has it; None where the disk has no room for one."""
        copy = self._folder / uuid.uuid4().hex / Path(name).name
        try:
            copy.parent.mkdir(parents=True)
            if isinstance(data, Path):
                shutil.copyfile(data, copy)
            else:
                copy.write_bytes(data)
        except OSError as error:
            shutil.rmtree(copy.parent, ignore_errors=True)
            log.warning("%s is not kept for MLflow (%s)", name, error)
            return None
        return str(copy)

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
        return self._told or self._full

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
        if self._held:
            log.warning("%d events are not kept for MLflow (%s)", len(self._held), self._full)
        return done

    def _put(self, do: str, **fields: Any) -> None:
        line = json.dumps({"do": do, "time": round(time.time() * 1000), **fields}) + "\n"
        with self._lock:
            self._held.append(line.encode())
            self._written += 1
            self._spool()
            self._lock.notify_all()

    def _spool(self) -> None:
        """Writes what is held, as far as there is room; with the lock held. No event is ever there in part."""
        while self._held:
            try:
                with open(self._file, "ab", buffering=0) as file:
                    end = file.seek(0, os.SEEK_END)
                    if file.write(self._held[0]) < len(self._held[0]):
                        file.truncate(end)
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                if not self._full:
                    log.warning(
                        "%s cannot be written (%s); what MLflow is to be told waits in memory", self._file, error
                    )
                self._full = str(error)
                return
            self._full = ""
            self._held.popleft()

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
        writer: Writer | None = None
        waited = 0.1
        seen = b""  # of the file before `at`: what a writer must know to go on
        while True:
            with self._lock:
                self._spool()
            with open(path, "rb") as file:
                if writer is None:
                    seen = file.read(at)
                file.seek(at)
                data = file.read()
            lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
            if not lines:
                if ended():
                    place.unlink(missing_ok=True)
                    path.with_suffix(".place-half").unlink(missing_ok=True)
                    path.unlink()
                    return True
                with self._lock:
                    self._lock.wait(1.0)
                continue
            try:
                if writer is None:
                    writer = Writer(self.uri)
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
            with suppress(OSError):  # no room: whoever goes on from here tells these events again
                half = path.with_suffix(".place-half")
                half.write_text(str(at))
                half.replace(place)
            count(told)


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
        path.with_suffix(".place-half").unlink(missing_ok=True)
        if path.with_suffix(".place").exists():
            os.rename(path.with_suffix(".place"), claimed.with_suffix(".place"))
        yield claimed


def _flat(params: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
