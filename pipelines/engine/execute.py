"""Runs the stages of a plan in threads, each as soon as its inputs are there, and tells how each ended.

Each stage runs in a thread of the driver as soon as the manifests it needs are there, so independent stages (the
trainers above all) overlap. Every action commits its own record, so nothing that finished is lost or done again,
whatever dies. Ray is started by the first stage that needs it and not at all when there is nothing to do; how
stages use it is in ray_shards.py and fits.py.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from infra.cluster import Node
from infra.errors import EXPECTED, NotFound, Refused, Stopped, advice
from infra.lease import TTL_S
from infra.records import Manifest, Record, damaged
from infra.store import Store
from infra.tracking import StageExtent
from pipelines.engine.admission import Admission, check_room
from pipelines.engine.console import Console
from pipelines.engine.fits import Fits, settle
from pipelines.engine.graph import Resolved, order, resolve, unfinished
from pipelines.engine.ray_shards import first_line, perform, run_actors, run_tasks
from pipelines.engine.tracking import data_sets
from pipelines.stage import Stage, plain
from unclip.errors import Refused as Impossible

log = logging.getLogger(__name__)


class _Skipped(Refused):
    """A stage that was not run, since one that it needs failed or was stopped."""


class Execution:
    """One run of the workflow over one store.

    `connect` starts or joins Ray and returns (cluster info, monitor); it is called at most once, and only when a stage
    has work that needs it. `ready` gives the stage as it is to run here and now (its `how` filled in), and is called
    only for a stage that has work. `lease_s`: a fit's lease is void that long after its holder's last sign of life.
    `foreseen`: the nodes that `connect` will find, where that is known before.
    """

    def __init__(
        self,
        store: Store,
        stages: Sequence[Stage],
        connect: Callable[[], tuple[Any, Any]],
        console: Console,
        ready: Callable[[Stage], Stage] = lambda stage: stage,
        lease_s: float = TTL_S,
        foreseen: Sequence[Node] = (),
    ) -> None:
        self.store, self.stages, self.console = store, order(stages), console
        self.ready, self.lease_s = ready, lease_s
        self.roles = {stage.name: getattr(stage, "role", "") for stage in self.stages}
        self.manifests: dict[str, Manifest] = {}
        self.failures: dict[str, BaseException] = {}
        self._connect, self._lock = connect, threading.Lock()
        self._foreseen, self._names = tuple(foreseen), set[str]()
        self._stopping = threading.Event()
        self._link: tuple[Any, Any] | None = None
        self._unlinked: Refused | None = None
        self._fits: Fits | None = None

    @property
    def monitor(self) -> Any:
        """The monitor, if Ray was needed so far."""
        return self._link[1] if self._link else None

    def link(self) -> tuple[Any, Any]:
        """Cluster info and monitor; starts Ray the first time.

        Refused where there is no Ray, or where it could never hold what a stage that is still to run asks for.
        """
        with self._lock:
            if self._unlinked is not None:
                raise self._unlinked
            if self._link is None:
                try:
                    self._link = self._join()
                except Refused as error:
                    self._unlinked = error
                    raise
            return self._link

    def _join(self) -> tuple[Any, Any]:
        waiting = unfinished([stage for stage in self.stages if stage.name in self._names], self.manifests, self.store)
        check_room(waiting, self._foreseen)
        self.console.note("starting Ray")
        info, monitor = self._connect()
        self.console.note("")
        check_room(waiting, info.nodes, info.growth)
        admission = Admission(*info.most)
        self._fits = Fits(self.store, self.console, monitor, admission, self._stopping, self.lease_s, self.roles)
        return info, monitor

    def stop(self) -> None:
        """Begins no more work, and asks the fits that run to save a checkpoint and stop; `run` then raises Stopped."""
        self._stopping.set()
        if self._fits is not None:
            self._fits.stop()

    def _go_on(self) -> None:
        """Raises Stopped once a stop was asked for."""
        if self._stopping.is_set():
            raise Stopped("stopped as asked")

    def run(self, names: set[str]) -> dict[str, Manifest]:
        """Runs the stages named, each as soon as its inputs are there; the others are only looked up.

        Raises Refused with the first failure's code (5 unless it has its own) naming every stage that failed, after
        those that do not depend on it have ended; Stopped if nothing failed but a stop was asked for.
        """
        self._names = names
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
            elif cause is self._unlinked:
                if str(cause) not in lines:  # it met every stage that wanted Ray, and is told once
                    lines.append(str(cause))
                    codes.append(self._unlinked.code)
            elif isinstance(cause, NotFound):
                lines.append(f"{name}: {damaged(cause.name, 'is missing')}")
                codes.append(5)
            elif isinstance(cause, Refused | Impossible):
                if not (stopping and isinstance(cause, Stopped)):
                    lines.append(f"{name}: {cause}")
                    codes.append(getattr(cause, "code", 2))
            elif type(cause).__module__ == "ray.exceptions":  # a process, a node or the head is gone
                lines.append(f"{name}: Ray lost what it was running ({type(cause).__name__}: {first_line(cause)})")
                codes.append(5)
            elif isinstance(cause, OSError) and cause.errno in EXPECTED:  # Ray's own files, or a stage's set-up
                lines.append(f"{name}: {cause.filename or 'a file that it wrote'}: {advice(cause)}")
                codes.append(5)
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
            manifest = resolved.manifest()
            self.console.state(
                stage.name, "present", len(resolved.actions), len(resolved.actions), states=manifest.states
            )
            if allowed:
                manifest.save(self.store)
                if stage.kind == "fit":
                    settle(resolved, self.store)
            return manifest
        began = time.monotonic()
        resolved = dataclasses.replace(resolved, stage=self.ready(stage))
        self.console.state(stage.name, "running", len(resolved.actions) - len(todo), len(resolved.actions))
        manifest = resolved.manifest(self._made(resolved))
        manifest.save(self.store)
        count = len(resolved.actions)
        self.console.state(stage.name, "done", count, count, time.monotonic() - began, manifest.states)
        return manifest

    def _made(self, resolved: Resolved) -> list[Record]:
        """Does what is missing, where the stage's kind says."""
        stage = resolved.stage
        if stage.kind == "driver":  # in this very process: small reduces, the ledger
            began = time.monotonic()
            made = [perform(stage, action, self.store) for action in resolved.todo]
            if self.monitor is not None and any(record.rows for record in made):
                with self._followed(resolved, self.monitor, time.monotonic() - began) as heard:
                    heard(made)
            return made
        info, monitor = self.link()  # first of all: Ray reads its environment when it is imported
        if stage.kind == "fit":
            assert self._fits is not None
            return [self._fits.fit(stage, action) for action in resolved.todo]
        work = {"task": run_tasks, "actor": run_actors}[stage.kind]
        with self._followed(resolved, monitor) as heard:
            return work(resolved, self.store, info, monitor, heard, self._go_on)

    @contextmanager
    def _followed(
        self, resolved: Resolved, monitor: Any, ago: float = 0.0
    ) -> Iterator[Callable[[Sequence[Record]], None]]:
        """Tells console and monitor of a stage that began `ago` seconds ago, and of the shards that the value hears are
        done, the newest last."""
        stage, count, todo = resolved.stage, len(resolved.actions), {action.key for action in resolved.todo}
        states: Counter[str] = Counter()
        for key, record in resolved.present.items():
            states.update({} if key in todo else record.states)
        present = count - len(todo)
        spec = plain(stage.spec)
        tags = {"unclip.key": resolved.whole.key, "unclip.inputs": " ".join(resolved.whole.inputs)}
        extent = StageExtent(count, present, states, ago)
        read = data_sets(self.store, ((need, self.manifests[need]) for need in stage.needs), self.roles)
        monitor.begin(stage.name, extent, spec if isinstance(spec, dict) else {}, tags, read)

        def heard(made: Sequence[Record]) -> None:
            monitor.shard(stage.name, made[-1].key, made[-1].states, done=True)
            self.console.state(stage.name, "running", present + len(made), count)

        status = "FAILED"
        try:
            yield heard
            status = "FINISHED"
        except Stopped:
            status = "KILLED"
            raise
        finally:
            monitor.finish(stage.name, status)


def last_line(error: BaseException) -> str:
    """The last line of an error's text: of a remote traceback, the part that says what happened."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else "no message"
