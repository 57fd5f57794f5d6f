"""`unclip run` and `plan`: from a recipe's name and a store to an execution, and what is said at its end."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infra.errors import Refused, Stopped
from infra.ledger import Ledger
from infra.records import Manifest
from infra.store import Store, open_store
from infra.tracking import installed_packages, machine_tags
from pipelines.download import Download
from pipelines.engine import Console, Execution, chosen, plan, source_tag
from pipelines.evaluate import check_name, read_prompts
from pipelines.recipe import Recipe, resolve_starts
from pipelines.recipe import schema as recipes
from pipelines.recipe import stages as workflow
from pipelines.reports import PAGE
from pipelines.source import SourceHow
from pipelines.stage import Stage, error_context, plain
from pipelines.versions import run_lease
from pipelines.world import Server, write_list, write_prompts


@dataclass(frozen=True)
class Prepared:
    """A recipe joined with a store: all that a plan or a run needs, nothing done yet."""

    recipe: recipes.Recipe
    store: Store
    inputs: workflow.Inputs
    stages: list[Stage]
    missing: Refused | None = None
    """Why the source cannot be read, where a plan went on without it."""


@contextlib.contextmanager
def prepared(name: str, store: str, changes: Sequence[str], *, create: bool) -> Iterator[Prepared]:
    """Checks recipe, lists and store; raises Refused for whatever is wrong, before anything is started.

    `create` is False for a plan: the store is only looked at, a source that cannot be read is told in `missing`, and
    one of more than `PLAN_BYTES` that is not known yet is not read. The world's list and prompts live in a temporary
    folder.
    """
    recipe = recipes.load(name, changes)
    opened = open_store(store, create=create)
    with tempfile.TemporaryDirectory(prefix="unclip-inputs-") as folder:
        with error_context(f"Recipe {name}"):
            inputs, stages, missing = _joined(recipe, opened, Path(folder), planning=not create)
        yield Prepared(recipe, opened, inputs, stages, missing)


def _joined(
    recipe: recipes.Recipe, store: Store, folder: Path, *, planning: bool
) -> tuple[workflow.Inputs, list[Stage], Refused | None]:
    """What the recipe reads from outside itself, and its stages; a world's list and prompts are written to `folder`."""
    urls, prompts = recipe.source.urls, recipe.evaluate.prompts
    if recipe.world:
        if not (recipe.source.tars or recipe.source.folder or recipe.source.uri):
            urls = urls or str(write_list(recipe.world, folder))
        prompts = prompts or str(write_prompts(recipe.world, folder))
    if prompts is None:
        raise Refused('evaluate.prompts is missing: name a file with a line {"prompt": …, "kind": …} for each prompt')
    if not os.path.isfile(prompts) and os.path.isfile(recipes.FOLDER / prompts):
        prompts = str(recipes.FOLDER / prompts)
    if not os.path.isfile(prompts):  # unlike Path's, it takes a name of any length
        raise Refused(f"evaluate.prompts: there is no file {prompts!r}")
    where = SourceHow(urls, recipe.source.tars, recipe.source.folder, recipe.source.uri)
    head = Ledger(store, recipe.release.name).head()
    digests, unread, missing = _read(where, recipe, planning=planning)
    inputs = workflow.Inputs(urls, digests, prompts, head, resolve_starts(recipe, store), unread)
    stages = workflow.stages(recipe, inputs)
    kinds = list(dict.fromkeys(prompt.kind for prompt in read_prompts(prompts)))
    for score in recipe.gate.minimum:
        judge, reference = recipe.evaluate.judge is not None, recipe.evaluate.reference is not None
        with error_context("gate.minimum"):
            check_name(score, kinds, judge=judge, reference=reference)
    return inputs, stages, missing


def _read(where: SourceHow, recipe: recipes.Recipe, *, planning: bool) -> tuple[tuple[str, ...], str, Refused | None]:
    """The source's digests; a plan goes on without them, saying why, where they cannot be had, or not cheaply."""
    if not planning:
        return where.digests(recipe.columns), "", None
    try:
        if (size := where.unread(recipe.columns)) > plan.PLAN_BYTES:
            return (), f"{size / 1e9:.1f} GB of the source are new: a run reads them first", None
        return where.digests(recipe.columns), "", None
    except Refused as error:
        return (), "its source cannot be read", error


def run_recipe(
    name: str, store: str, changes: Sequence[str], *, until: str | None, only: str | None, address: str | None
) -> dict[str, Manifest]:
    """Runs what is to do and tells the person at the terminal where it stands and what came of it."""
    from infra.cluster import Node, connect, disconnect, usable_cpus
    from infra.tracking import Monitor, check_server, default_uri

    with prepared(name, store, changes, create=True) as job, contextlib.ExitStack() as stack:
        names = chosen(job.stages, until, only)
        stack.enter_context(run_lease(job.store))
        tracking = job.recipe.tracking
        uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(store)
        if tracking.required:
            check_server(uri)
        server = stack.enter_context(Server(job.recipe.world)) if job.recipe.world else None
        console = Console([stage.name for stage in job.stages if stage.name in names])

        def link() -> tuple[Any, Any]:
            info = connect(address, job.recipe.cluster.cpus, dashboard=job.recipe.cluster.dashboard)
            stack.callback(disconnect)
            monitor = Monitor.launch(uri, tracking.experiment, name, job.store.uri)
            stack.callback(monitor.close)
            track_run(monitor, name, job.recipe)
            return info, monitor

        def ready(stage: Stage) -> Stage:
            """A stage as it runs now: the world's hosts live where its server listens."""
            if server is None or not isinstance(stage, Download):
                return stage
            resolve = {
                host: f"127.0.0.1:{server.start()}" if at == "world" else at for host, at in stage.how.resolve.items()
            }
            return dataclasses.replace(stage, how=dataclasses.replace(stage.how, resolve=resolve))

        # Of a local Ray the CPUs are known before it starts; how many GPUs it finds is not.
        foreseen = () if address else (Node(job.recipe.cluster.cpus or usable_cpus(), math.inf),)
        execution = Execution(job.store, job.stages, link, console, ready, foreseen=foreseen)
        status = "FAILED"
        try:
            with console, _stoppable(execution, console):
                manifests = execution.run(names)
            status = "FINISHED"
        except Stopped:
            status = "KILLED"
            raise
        finally:
            if execution.monitor is not None:
                execution.monitor.end("", status)
        summary(console, job, names, manifests, store, uri)
        return manifests


@contextlib.contextmanager
def _stoppable(execution: Execution, console: Console) -> Iterator[None]:
    """SIGINT (Ctrl-C) and SIGTERM (a job that is stopped) save and stop; the second one ends the process at once."""

    def handle(number: int, frame: Any) -> None:
        signal.signal(number, lambda *_: os._exit(128 + number))
        threading.Thread(target=stop, args=(number,), name="stop", daemon=True).start()

    def stop(number: int) -> None:  # not in the handler itself, which may hold a lock of the console
        console.note(f"{signal.Signals(number).name}: saving and stopping; once more ends at once and saves nothing")
        execution.stop()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summary(console: Console, job: Prepared, names: set[str], made: dict[str, Manifest], store: str, uri: str) -> None:
    """What came of it: the release and its scores, where to look, and how to go on."""
    from pipelines.promote import ledger as releases

    if "data-report" in made and "data-report" in names:
        about = made["curate"].version
        folder = releases.view_folder(job.store, about, [made["data-report"].only])
        console.terminal.print(f"data       {folder / PAGE}", markup=False, soft_wrap=True)
    if "promote" in names:
        for line in releases.summary(job.store, job.recipe.release.name, made, store, uri):
            console.terminal.print(line, markup=False, soft_wrap=True)


def track_run(monitor: Any, name: str, recipe: Recipe) -> None:
    """Of the run as a whole: its recipe with all changes, git's state, versions of all packages."""
    monitor.tag("", {**machine_tags(), **source_tag(name)})
    monitor.artifact("", recipe_text(recipe).encode(), "recipe.yaml")
    monitor.artifact("", installed_packages().encode(), "packages.txt")


def recipe_text(recipe: Recipe) -> str:
    """A recipe as YAML that gives the same recipe again, but for the tracking server's address, which may hold a
    password."""
    told = dataclasses.replace(recipe, tracking=dataclasses.replace(recipe.tracking, uri=None))
    return yaml.safe_dump(_said(plain(told) | plain(recipe.sections)), sort_keys=False)


def _said(value: Any) -> Any:
    """Without what was left out."""
    if isinstance(value, dict):
        return {name: _said(part) for name, part in value.items() if part is not None}
    return [_said(part) for part in value] if isinstance(value, list) else value
