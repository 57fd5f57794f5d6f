"""Does what the graph says is to do: the one room of Ray tasks and Ray Data.

Each stage runs in a thread of the driver as soon as the manifests it needs are there, so independent stages (the
trainers above all) overlap. Every action commits its own record, so nothing that finished is lost or done again,
whatever dies. Ray is started by the first stage that needs it and not at all when there is nothing to do.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any

from infra.errors import Refused, Stopped
from infra.lease import TTL_S, Lease
from infra.manifest import Action, Manifest, Record, canonical, commit
from infra.store import Store
from pipelines.admission import Admission, most_actors, needs_of
from pipelines.console import Console
from pipelines.graph import Resolved, order, resolve
from pipelines.stage import Stage
from training.launch import request_stop
from unclip.errors import Refused as Impossible

log = logging.getLogger(__name__)

_ready: set[str] = set()


def perform(stage: Stage, action: Action, store: Store) -> Record:
    """Does one action in this process and commits it; the stage is set up once a process."""
    name = repr(stage)
    if name not in _ready:
        stage.setup()
        _ready.add(name)
    with store.scratch() as scratch:
        return commit(store, action, stage.run(action, store, scratch), scratch)


class ShardWorker:
    """What an actor of a pool holds: the stage, set up once; its rows are actions."""

    def __init__(self, stage: Stage, store: Store, monitor: Any) -> None:
        self.stage, self.store = stage, store

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of one action (JSON) → the record that was committed (JSON), or what was refused, in its own words.

        A refusal travels as data, since Ray Data would wrap it into an error of its own.
        """
        import numpy as np

        document = json.loads(str(batch["action"][0]))
        action = Action(document["stage"], document["spec"], tuple(document["inputs"]))
        record, refused, code = "", "", 0
        try:
            record = perform(self.stage, action, self.store).to_json(action).decode()
        except (Refused, Impossible) as error:
            refused, code = str(error), getattr(error, "code", 2)
        return {"record": np.array([record]), "refused": np.array([refused]), "code": np.array([code])}


class _Skipped(Refused):
    """A stage that was not run, since one that it needs failed or was stopped."""


class Execution:
    """One run of the workflow over one store.

    `connect` starts or joins Ray and returns (cluster info, monitor); it is called at most once, and only when a stage
    has work that needs it. `ready` gives the stage as it is to run here and now (its `how` filled in), and is called
    only for a stage that has work. `lease_s`: a fit's lease is void that long after its holder's last sign of life.
    """

    def __init__(
        self,
        store: Store,
        stages: Sequence[Stage],
        connect: Callable[[], tuple[Any, Any]],
        console: Console,
        ready: Callable[[Stage], Stage] = lambda stage: stage,
        lease_s: float = TTL_S,
    ) -> None:
        self.store, self.stages, self.console = store, order(stages), console
        self.ready, self.lease_s = ready, lease_s
        self.manifests: dict[str, Manifest] = {}
        self.failures: dict[str, BaseException] = {}
        self._connect, self._lock = connect, threading.Lock()
        self._stopping = threading.Event()
        self._leases: dict[str, int] = {}
        self._link: tuple[Any, Any] | None = None
        self._admission: Admission | None = None

    @property
    def monitor(self) -> Any:
        """The monitor, if Ray was needed so far."""
        return self._link[1] if self._link else None

    def link(self) -> tuple[Any, Any]:
        """Cluster info and monitor; starts Ray the first time."""
        with self._lock:
            if self._link is None:
                self.console.note("starting Ray")
                self._link = self._connect()
                self.console.note("")
                info = self._link[0]
                self._admission = Admission(info.cpus, info.gpus)
            return self._link

    def stop(self) -> None:
        """Begins no more work, and asks the fits that run to save a checkpoint and stop; `run` then raises Stopped."""
        self._stopping.set()
        if self._admission is not None:
            self._admission.close()
        for key, lease in list(self._leases.items()):
            request_stop(self.store, key, lease)

    def _go_on(self) -> None:
        """Raises Stopped once a stop was asked for."""
        if self._stopping.is_set():
            raise Stopped("stopped as asked")

    def run(self, names: set[str]) -> dict[str, Manifest]:
        """Runs the stages named, each as soon as its inputs are there; the others are only looked up.

        Raises Refused with the first failure's code (5 unless it has its own) naming every stage that failed, after
        those that do not depend on it have ended; Stopped if nothing failed but a stop was asked for.
        """
        waiting = {stage.name: stage for stage in self.stages if stage.name in names or self._before(stage, names)}
        running: dict[Future[Manifest], Stage] = {}
        with ThreadPoolExecutor(max(8, len(self.stages))) as pool:
            while waiting or running:
                for name, stage in list(waiting.items()):
                    if any(need in self.failures for need in stage.needs):
                        self.failures[name] = _Skipped(f"{name}: not run, since what it needs failed", code=5)
                        self.console.state(name, "skipped")
                        del waiting[name]
                    elif all(need in self.manifests for need in stage.needs):
                        del waiting[name]
                        running[pool.submit(self._stage, stage, name in names)] = stage
                if not running:
                    continue
                done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    stage = running.pop(future)
                    error = future.exception()
                    if error is not None:
                        self.failures[stage.name] = error
                        self.console.state(stage.name, "failed")
                    else:
                        self.manifests[stage.name] = future.result()
                if self._link:
                    self.console.board(self._link[1].board())
        if self.failures:
            raise self._failed()
        return self.manifests

    def _before(self, stage: Stage, names: set[str]) -> bool:
        """Whether a stage that is not to run is needed (at any distance) by one that is."""
        below = {need for other in self.stages if other.name in names for need in other.needs}
        grown = True
        while grown:
            more = {need for other in self.stages if other.name in below for need in other.needs} - below
            below |= more
            grown = bool(more)
        return stage.name in below

    def _failed(self) -> Refused:
        """The failures as one message; the first real one gives the exit code. Stopped if there is only that."""
        lines, codes, skipped = list[str](), list[int](), list[str]()
        stopping = self._stopping.is_set()
        for name, error in self.failures.items():
            cause = getattr(error, "cause", None) or error  # Ray wraps what a task raised
            if isinstance(cause, _Skipped):
                skipped.append(name)
            elif isinstance(cause, Refused | Impossible):
                if not (stopping and isinstance(cause, Stopped)):
                    lines.append(f"{name}: {cause}")
                    codes.append(getattr(cause, "code", 2))
            else:
                log.error("stage %s failed", name, exc_info=error)
                lines.append(f"{name} failed: {type(cause).__name__}: {last_line(cause)}")
                codes.append(5)
        if stopping:
            kept = "stopped. Fits saved a checkpoint and what finished is kept; the same command goes on from there."
            return Refused("\n".join([*lines, kept]), code=codes[0]) if lines else Stopped(kept)
        if codes[0] == 5:
            if skipped:
                lines.append(f"Not run, since they need it: {', '.join(skipped)}.")
            lines.append("What finished is kept; the same command goes on from there.")
        return Refused("\n".join(lines), code=codes[0])

    def _stage(self, stage: Stage, allowed: bool) -> Manifest:
        """Resolves one stage, does what is missing, saves and returns its manifest."""
        resolved = resolve(stage, [self.manifests[need] for need in stage.needs], self.store)
        todo = resolved.todo
        if todo and not allowed:
            raise Refused(
                f"{stage.name} has {len(todo)} of {len(resolved.actions)} shards still to do, and this run does not "
                f"include it. Run it first: unclip run RECIPE --until {stage.group}"
            )
        if todo:
            self._go_on()
        else:
            self.console.state(stage.name, "present", len(resolved.actions), len(resolved.actions))
            manifest = resolved.manifest()
            if allowed:
                manifest.save(self.store)
                self._settle(resolved)
            return manifest
        began = time.monotonic()
        resolved = dataclasses.replace(resolved, stage=self.ready(stage))
        self.console.state(stage.name, "running", len(resolved.present), len(resolved.actions))
        made = {"task": self._tasks, "actor": self._actors, "driver": self._here, "fit": self._fits}[stage.kind](
            resolved
        )
        manifest = resolved.manifest(made)
        manifest.save(self.store)
        count = len(resolved.actions)
        self.console.state(stage.name, "done", count, count, seconds=time.monotonic() - began)
        return manifest

    def _here(self, resolved: Resolved) -> list[Record]:
        """In the driver's process: small reduces, the ledger."""
        return [perform(resolved.stage, action, self.store) for action in resolved.todo]

    def _tasks(self, resolved: Resolved) -> list[Record]:
        """One Ray task a shard, a bounded number in flight."""
        info, _ = self.link()  # first: Ray reads its environment when it is imported
        import ray

        stage = resolved.stage
        cpus = getattr(stage.how, "cpus", 1)
        work = ray.remote(num_cpus=cpus, max_retries=3)(perform)
        shared = ray.put(stage)
        todo, made = list(resolved.todo), list[Record]()
        flying: dict[Any, Action] = {}
        try:
            while todo or flying:
                while todo and len(flying) < 2 * max(1, int(info.cpus / max(cpus, 0.1))):
                    action = todo.pop(0)
                    flying[work.remote(shared, action, self.store)] = action
                ready, _ = ray.wait(list(flying), timeout=1.0)
                for reference in ready:
                    del flying[reference]
                    made.append(ray.get(reference))
                    self._shards(resolved, len(made))
                if todo or flying:
                    self._go_on()
        finally:  # what is left after a stop or a failure must not go on by itself: a web server may end with this run
            for reference in flying:
                ray.cancel(reference, force=True)
            if flying:
                ray.wait(list(flying), num_returns=len(flying), timeout=10.0)
        return made

    def _actors(self, resolved: Resolved) -> list[Record]:
        """A Ray Data job over actions: one row is one shard, and the actor that did it has committed it."""
        info, monitor = self.link()
        import ray.data

        stage, todo = resolved.stage, resolved.todo
        cpus, gpus = getattr(stage.how, "cpus", 1), getattr(stage.how, "gpus", 0)
        most = getattr(stage.how, "actors", 0) or most_actors(info, cpus, gpus)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        rows = [{"action": canonical(action.document).decode()} for action in todo]
        done = (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .map_batches(
                ShardWorker,
                fn_constructor_args=(stage, self.store, monitor),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(most, len(todo))),
                num_cpus=cpus,
                num_gpus=gpus or None,
            )
            .iter_rows()
        )
        made = []
        for row in done:
            if row["refused"]:
                raise Refused(row["refused"], code=int(row["code"]))
            made.append(Record.from_json(row["record"].encode()))
            self._shards(resolved, len(made))
            if len(made) < len(todo):
                self._go_on()
        return made

    def _fits(self, resolved: Resolved) -> list[Record]:
        """Ray Train, under a lease and within the cluster's resources."""
        return [self._fit(resolved.stage, action) for action in resolved.todo]

    def _fit(self, stage: Any, action: Action) -> Record:
        _, monitor = self.link()
        assert self._admission is not None
        need = needs_of(stage)
        self._admission.check(stage.name, need)
        self.console.state(stage.name, "waiting")
        self._stopping.wait(getattr(stage.how, "nice", 0))  # what gives way does so from the start: imports take cores
        self._go_on()  # once the admission is there, so that a stop before that is not missed
        self._admission.enter(need)
        try:
            made = None
            while made is None:
                self._go_on()
                made = self._record(action)
                if made is None and (lease := Lease.acquire(self.store, action.key, self.lease_s)):
                    made = self._hold(stage, action, monitor, lease)
                elif made is None:
                    self.console.state(stage.name, "trained by another run")
                    self._stopping.wait(1.0)
            return made
        finally:
            self._admission.leave(need)

    def _hold(self, stage: Any, action: Action, monitor: Any, lease: Lease) -> Record | None:
        """One fit under its lease; None if that was lost and the fit stopped (or failed) for it: another has it now."""
        with lease.kept() as lost, self._stopped_once(lost, action.key, lease.number):
            found = self._record(action)
            if found is not None:
                return found
            try:
                return self._train(stage, action, monitor, lease.number, lost)
            except Refused:
                if lost.is_set() and not self._stopping.is_set():
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

    def _settle(self, resolved: Resolved) -> None:
        """Removes the checkpoints of finished fits that a driver left, which died right after it had committed."""
        if resolved.stage.kind == "fit":
            stage: Any = resolved.stage
            for action in resolved.actions:
                stage.settle(action, self.store)

    def _train(self, stage: Any, action: Action, monitor: Any, lease: int, lost: threading.Event) -> Record:
        """One fit, as a child run in MLflow from its start to its end."""
        self.console.state(stage.name, "running")
        tags = {"unclip.key": action.key, "unclip.inputs": " ".join(action.inputs)}
        monitor.start(stage.name, {"model": stage.spec.model, "train": stage.spec.train}, tags)
        status = "FAILED"
        try:
            self._leases[action.key] = lease
            self._go_on()  # once the lease is known, so that a stop between the two is not missed
            with self.store.scratch() as out:
                won = commit(self.store, action, stage.fit(action, self.store, out, monitor, lease), out)
            if not lost.is_set():  # else they are the next holder's, who may be training from them
                stage.settle(action, self.store)
            status = "FINISHED"
            return won
        except Stopped:
            status = "KILLED"
            raise
        finally:
            self._leases.pop(action.key, None)
            monitor.end(stage.name, status)

    def _record(self, action: Action) -> Record | None:
        name = action.record_name()
        return Record.from_json(self.store.get(name), name) if self.store.exists(name) else None

    def _shards(self, resolved: Resolved, made: int) -> None:
        self.console.state(resolved.stage.name, "running", len(resolved.present) + made, len(resolved.actions))


def last_line(error: BaseException) -> str:
    """The last line of an error's text: of a remote traceback, the part that says what happened."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else "no message"
