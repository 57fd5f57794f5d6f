"""Runs fits: admitted by size, under a lease, stopped when asked, and tidied up once their record is committed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from infra.errors import Refused, Stopped
from infra.lease import Lease
from infra.records import Action, Record, commit, current_record
from infra.store import Store
from pipelines.engine.admission import Admission, needs_of
from pipelines.engine.console import Console
from pipelines.engine.graph import Resolved
from pipelines.engine.tracking import track_files, track_fit
from training.launch import request_stop


class Fits:
    """The fits of one run on one cluster.

    `stopping` is set once the run is to stop; `lease_s`: see `Execution`; `roles`: see `data_sets`.
    """

    def __init__(
        self,
        store: Store,
        console: Console,
        monitor: Any,
        admission: Admission,
        stopping: threading.Event,
        lease_s: float,
        roles: Mapping[str, str],
    ) -> None:
        self.store, self.console, self.monitor = store, console, monitor
        self.admission, self.stopping, self.lease_s = admission, stopping, lease_s
        self.roles = roles
        self._leases: dict[str, int] = {}

    def stop(self) -> None:
        """Lets no fit begin any more, and asks those that run to save a checkpoint and stop."""
        self.admission.close()
        for key, lease in list(self._leases.items()):
            request_stop(self.store, key, lease)

    def _go_on(self) -> None:
        """Raises Stopped once a stop was asked for."""
        if self.stopping.is_set():
            raise Stopped("stopped as asked")

    def fit(self, stage: Any, action: Action) -> Record:
        """Does one action of a fit once its CPUs and GPUs are free: trains, or takes what another run trained."""
        need = needs_of(stage)
        self.console.state(stage.name, "waiting")
        self.stopping.wait(getattr(stage.how, "nice", 0))  # what gives way does so from the start: imports take cores
        self._go_on()  # once the admission is there, so that a stop before that is not missed
        self.admission.enter(need)
        try:
            made = None
            while made is None:
                self._go_on()
                made = current_record(self.store, action)
                if made is None and (lease := Lease.acquire(self.store, action.key, self.lease_s)):
                    made = self._hold(stage, action, lease)
                elif made is None:
                    self.console.state(stage.name, "trained by another run")
                    self.stopping.wait(1.0)
            return made
        finally:
            self.admission.leave(need)

    def _hold(self, stage: Any, action: Action, lease: Lease) -> Record | None:
        """One fit under its lease; None if that was lost and the fit stopped (or failed) for it: another has it now."""
        with lease.kept() as lost, self._stopped_once(lost, action.key, lease.number):
            found = current_record(self.store, action)
            if found is not None:
                return found
            try:
                return self._train(stage, action, lease.number, lost)
            except Refused:
                if lost.is_set() and not self.stopping.is_set():
                    return None
                raise

    @contextmanager
    def _stopped_once(self, lost: threading.Event, key: str, lease: int) -> Iterator[None]:
        """Asks a fit to stop once its lease is lost: as soon as the store answers, which may be why it was lost."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.5):
                if lost.is_set():
                    with suppress(Refused, OSError):
                        return request_stop(self.store, key, lease)

        thread = threading.Thread(target=watch, name=f"lost {key[:12]}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _train(self, stage: Any, action: Action, lease: int, lost: threading.Event) -> Record:
        """One fit, as a child run in MLflow from its start to its end."""
        self.console.state(stage.name, "running")
        track_fit(self.monitor, stage, action, self.store, self.roles)
        status = "FAILED"
        try:
            self._leases[action.key] = lease
            self._go_on()  # once the lease is known, so that a stop between the two is not missed
            with self.store.scratch() as out:
                won = commit(self.store, action, stage.fit(action, self.store, out, self.monitor, lease), out)
            track_files(self.monitor, stage.name, {name: file.sha256 for name, file in won.files.items()})
            if not lost.is_set():  # else they are the next holder's, who may be training from them
                stage.settle(action, self.store)
            status = "FINISHED"
            return won
        except Stopped:
            status = "KILLED"
            raise
        finally:
            self._leases.pop(action.key, None)
            self.monitor.end(stage.name, status)


def settle(resolved: Resolved, store: Store) -> None:
    """Removes the checkpoints of finished fits that a driver left, which died right after it had committed."""
    stage: Any = resolved.stage
    for action in resolved.actions:
        stage.settle(action, store)
