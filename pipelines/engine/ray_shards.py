"""Stages of many shards on Ray: a task a shard, or a pool of actors under Ray Data. Each commits its own record."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infra.cluster import ClusterInfo
from infra.documents import canonical
from infra.errors import EXPECTED, Refused, advice
from infra.records import Action, Record, check_inputs, commit
from infra.store import Store
from pipelines.engine.admission import most_actors
from pipelines.engine.graph import Resolved
from pipelines.progress import reporting_to
from pipelines.stage import Stage
from unclip.errors import Refused as Impossible

RETRIES = 2
"""How often Ray tries a task again whose worker, or node, died."""

_ready: set[str] = set()
log = logging.getLogger(__name__)


def perform(stage: Stage, action: Action, store: Store, monitor: Any = None) -> Record:
    """Does one action in this process and commits it; the stage is set up once a process.

    monitor: who hears meanwhile what became of the shard's rows, if anybody does.
    """
    name = repr(stage)
    if name not in _ready:
        stage.setup()
        _ready.add(name)

    def told(states: Mapping[str, int], rows: int) -> None:
        if monitor is not None:
            monitor.shard(stage.name, action.key, states, rows)

    with store.scratch() as scratch, reporting_to(told):
        try:
            made = stage.run(action, store, scratch)
        except (Refused, Impossible):
            raise
        except (ValueError, KeyError, OSError) as error:
            if isinstance(error, OSError) and error.errno in EXPECTED:
                where = error.filename or f"files of {stage.name} in {scratch}"
                raise Refused(f"{where}: {advice(error)}", code=5) from error
            check_inputs(store, action)  # which tells what is damaged, if that is why
            raise
        return commit(store, action, made, scratch)


class ShardWorker:
    """What an actor of a pool holds: the stage, set up once; its rows are actions."""

    def __init__(self, stage: Stage, store: Store, monitor: Any) -> None:
        self.stage, self.store, self.monitor = stage, store, monitor

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of one action (JSON) → the record that was committed (JSON), or what was refused, in its own words.

        A refusal travels as data, since Ray Data would wrap it into an error of its own.
        """
        import numpy as np

        document = json.loads(str(batch["action"][0]))
        action = Action(document["stage"], document["spec"], tuple(document["inputs"]))
        record, refused, code = "", "", 0
        try:
            record = perform(self.stage, action, self.store, self.monitor).to_json(action).decode()
        except (Refused, Impossible) as error:
            refused, code = str(error), getattr(error, "code", 2)
        return {"record": np.array([record]), "refused": np.array([refused]), "code": np.array([code])}


def run_tasks(
    resolved: Resolved,
    store: Store,
    info: ClusterInfo,
    monitor: Any,
    told: Callable[[Sequence[Record]], None],
    go_on: Callable[[], None],
) -> list[Record]:
    """One Ray task a shard, a bounded number in flight. Ray is connected.

    monitor hears from the tasks; told hears of the shards done so far, the newest last; go_on raises to give up what is
    in flight. A shard whose workers die is tried again; one that goes on ending them is done carefully, where its stage
    knows how. Refused where that is no use.
    """
    import ray
    from ray.exceptions import LocalRayletDiedError, NodeDiedError, OutOfMemoryError, WorkerCrashedError

    died = (WorkerCrashedError, NodeDiedError, OutOfMemoryError, LocalRayletDiedError)
    stage = resolved.stage
    cpus = getattr(stage.how, "cpus", 1)
    work = ray.remote(num_cpus=cpus, max_retries=RETRIES)(perform)
    shared = ray.put(stage)
    careful = stage.carefully() if hasattr(stage, "carefully") else None
    todo, made = list(resolved.todo), list[Record]()
    flying: dict[Any, Action] = {}
    suspects = set[str]()
    try:
        while todo or flying:
            while todo and len(flying) < 2 * max(1, int(info.cpus / max(cpus, 0.1))):
                action = todo.pop(0)
                given = careful if action.key in suspects else shared
                flying[work.remote(given, action, store, monitor)] = action
            ready, _ = ray.wait(list(flying), timeout=1.0)
            for reference in ready:
                action = flying.pop(reference)
                try:
                    made.append(ray.get(reference))
                except died as error:
                    shard = f"shard {resolved.actions.index(action) + 1} of {len(resolved.actions)}"
                    if careful is None or action.key in suspects:
                        raise Refused(_hopeless(shard, error), code=5) from error
                    log.warning("%s: %s ended its workers; it is done again, picture by picture", stage.name, shard)
                    suspects.add(action.key)
                    todo.insert(0, action)
                    continue
                told(made)
            if todo or flying:
                go_on()
    finally:  # what is left after a stop or a failure must not go on by itself: a web server may end with this run
        for reference in flying:
            ray.cancel(reference, force=True)
        if flying:
            ray.wait(list(flying), num_returns=len(flying), timeout=10.0)
    return made


def first_line(error: BaseException) -> str:
    """The first line of an error's text: of Ray's, what happened; the rest is about its log files."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message").rstrip(".")


def _hopeless(shard: str, error: BaseException) -> str:
    return (
        f"{shard} ended its worker {RETRIES + 1} times in a row ({type(error).__name__}: {first_line(error)}). Mostly "
        "memory or disk is short, or nodes go away: give its tasks more room (more `cpus` each, fewer `threads`) and "
        "run again. Ray's logs, in its session's folder, say more."
    )


def run_actors(
    resolved: Resolved,
    store: Store,
    info: ClusterInfo,
    monitor: Any,
    told: Callable[[Sequence[Record]], None],
    go_on: Callable[[], None],
) -> list[Record]:
    """A Ray Data job over actions, as `run_tasks`: one row is one shard, and the actor that did it has committed it."""
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
            fn_constructor_args=(stage, store, monitor),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(most, len(todo))),
            num_cpus=cpus,
            num_gpus=gpus or None,
        )
        .iter_rows()
    )
    made: list[Record] = []
    for row in done:
        if row["refused"]:
            raise Refused(row["refused"], code=int(row["code"]))
        made.append(Record.from_json(row["record"].encode()))
        told(made)
        if len(made) < len(todo):
            go_on()
    return made
