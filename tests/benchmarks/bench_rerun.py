"""A run with nothing to do over 10,000 shards: seconds to know it, and what the store is asked meanwhile.

Run with `make bench`. The records are made up and lie where the stages would have put them, 10,000 each of download,
filter-look, embed, curate-look and data-count; of a local store and of one in a real S3 server (tests/rgw.sh). What is
timed is the decision, from the first listing to the last, in a process that has imported everything: its processor time
counts, which leaves out what else a shared machine does; the clock's, and the whole command with the interpreter's
start and its imports, are printed beside it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from infra.documents import digest
from infra.records.manifest import Action, Block, File, Manifest, Record
from infra.records.schemas import KEPT
from infra.store.base import Store
from infra.store.local import LocalStore
from infra.store.opening import open_store
from infra.store.s3 import S3Store
from pipelines.engine.console import Console
from pipelines.engine.execute import Execution
from pipelines.engine.graph import order, resolve
from pipelines.engine.plan import plan
from pipelines.recipe import schema as recipes
from pipelines.run import prepared
from tests.fixtures.faulty_s3 import Request, failing

pytest_plugins = ["tests.fixtures.s3"]

SHARDS, ROWS = 10_000, 1000
SECONDS = 5.0
DATA = ("source", "download", "filter-look", "filter", "clip", "embed", "curate-look", "curate", "data-count")
MAPS = ("download", "filter-look", "embed", "curate-look", "data-count")
PAGE = 1000
"""Names in one answer to a listing of S3."""


def write_recipe(folder: Path) -> Path:
    """The tiny recipe over a list that nobody reads: its digest is all that counts."""
    (folder / "list.csv").write_text("url,caption\nhttps://pictures.test/1.png,a picture\n")
    said = yaml.safe_load((recipes.FOLDER / "tiny.yaml").read_text())
    del said["world"], said["download"]["resolve"], said["evaluate"]
    said |= {"source": {"urls": str(folder / "list.csv")}, "evaluate": {"prompts": "prompts.jsonl"}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


def record(action: Action, files: list[str], **more: Any) -> Record:
    """A record of files that are nowhere."""
    made = {name: File(digest(f"{name} of {action.key}".encode()), 1) for name in files}
    return Record(action.key, 0, made, ROWS, {KEPT: ROWS}, **more)


def records(stage: str, actions: tuple[Action, ...], known: dict[str, Manifest]) -> list[Record]:
    """What a stage would have left."""
    slices = [f"{number:05d}.parquet" for number in range(SHARDS)]
    blocks = tuple(Block("table.parquet", first, 256) for first in range(0, ROWS, 256))
    match stage:
        case "source":
            return [record(actions[0], slices, facts={"slices": slices})]
        case "download":
            return [record(action, ["images.tar", "index.parquet"], blocks=blocks) for action in actions]
        case "filter":
            return [record(actions[0], [f"{one.sha('index.parquet')}.parquet" for one in known["download"].records])]
        case "embed":
            return [record(action, ["rows.parquet"], blocks=blocks) for action in actions]
        case "curate":
            return [record(actions[0], [f"{one.sha('rows.parquet')}.parquet" for one in known["embed"].records])]
        case "data-count":
            return [record(action, ["counts.parquet", "shown.parquet"]) for action in actions]
        case _:
            return [record(action, ["look.parquet"]) for action in actions]


def put(store: Store, name: str, data: bytes) -> None:
    """Locally without waiting for the disk at each of 40,000 names."""
    if isinstance(store, LocalStore):
        path = store.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    else:
        store.put_new(name, data)


def fill(store: Store, recipe: Path) -> None:
    """Puts every record and manifest of the data."""
    known: dict[str, Manifest] = {}
    with prepared(str(recipe), store.uri, (), create=True) as job, ThreadPoolExecutor(16) as pool:
        for stage in (one for one in order(job.stages) if one.name in DATA):
            there = resolve(stage, [known[need] for need in stage.needs], store)
            made = records(stage.name, there.actions, known)
            pairs = list(zip(there.actions, made, strict=True))
            list(pool.map(lambda pair: put(store, pair[0].record_name(), pair[1].to_json(pair[0])), pairs))
            known[stage.name] = there.manifest(made)
            known[stage.name].save(store)


class Took(NamedTuple):
    """Seconds of this process's processor time, and on the clock."""

    cpu: float
    wall: float

    def __str__(self) -> str:
        return f"{self.cpu:.2f} s of processor time ({self.wall:.2f} s on the clock)"


def timed(work: Callable[[], Any]) -> tuple[Took, Any]:
    """How long it takes, and what it returns."""
    cpu, wall = time.process_time(), time.perf_counter()
    made = work()
    return Took(time.process_time() - cpu, time.perf_counter() - wall), made


def nothing_to_do(uri: str, recipe: Path) -> tuple[Took, Took]:
    """How long a run, and a plan, take to know it."""

    def connect() -> tuple[Any, Any]:
        raise AssertionError("there was something to do")

    with prepared(str(recipe), uri, (), create=False) as job:
        stages = [stage for stage in job.stages if stage.name in DATA]
        took, made = timed(lambda: Execution(job.store, stages, connect, Console(DATA)).run({*DATA}))
        assert {name: len(manifest.records) for name, manifest in made.items()} == {
            name: SHARDS if name in MAPS else 1 for name in DATA
        }
        planned, lines = timed(lambda: plan(stages, job.store))
        assert not any(line.todo for line in lines)
        return took, planned


@contextmanager
def counted(store: S3Store) -> Iterator[Counter[str]]:
    """Requests that this process sends to S3, by kind: LIST, GET, HEAD, PUT."""
    count: Counter[str] = Counter()

    def note(request: Any, **_: Any) -> None:
        count["LIST" if "list-type=2" in request.url else request.method] += 1

    events = store._client.meta.events
    events.register("before-send.s3", note)
    try:
        yield count
    finally:
        events.unregister("before-send.s3", note)


def test_a_rerun_over_ten_thousand_shards_is_decided_in_seconds(tmp_path: Path) -> None:
    store, recipe = open_store(str(tmp_path / "store")), write_recipe(tmp_path)
    fill(store, recipe)
    took = [nothing_to_do(store.uri, recipe) for _ in range(3)]
    run, planned = (min(times) for times in zip(*took, strict=True))
    print(f"\nnothing to do over {SHARDS} shards, local store: run {run}, plan {planned}", flush=True)
    # Not to the end of curate, whose data-report would read rows that are nowhere.
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "run",
        str(recipe),
        "--until",
        "curate-look",
        "--store",
        store.uri,
    ]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    print(f"the whole command, imports included: {time.perf_counter() - began:.2f} s", flush=True)
    assert max(run.cpu, planned.cpu) < SECONDS


def test_in_s3_it_takes_one_listing_a_stage_and_no_request_a_shard(s3_uri: str, tmp_path: Path) -> None:
    store, recipe = open_store(s3_uri), write_recipe(tmp_path)
    assert isinstance(store, S3Store)
    fill(store, recipe)
    with counted(store) as count:
        run, planned = nothing_to_do(store.uri, recipe)
    requests = ", ".join(f"{number} {kind}" for kind, number in sorted(count.items()))
    print(f"\nnothing to do over {SHARDS} shards, S3: run {run}, plan {planned}; both: {requests}", flush=True)
    pages = len(MAPS) * (SHARDS // PAGE + 3)
    # Of run and plan each: pages of records of the maps, then a few requests a stage.
    assert count["LIST"] <= 2 * (pages + 3 * len(DATA))
    assert count.total() - count["LIST"] <= 2 * 8 * len(DATA)
    assert max(run.cpu, planned.cpu) < SECONDS


def test_a_listing_does_not_wait_for_one_page_after_the_other(s3_endpoint: str, s3_uri: str) -> None:
    """Through a server that takes 150 ms for a page, as those far away do."""
    store = open_store(s3_uri)
    folder = "records/embed-1/0123456789abcdef/"
    names = [f"{folder}{digest(str(number).encode())}.0.json" for number in range(SHARDS)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.put_new(name, b"{}"), names))

    def slow(request: Request) -> None:
        if "list-type=2" in request.path:
            time.sleep(0.15)

    with failing(s3_endpoint, slow) as proxy:
        there = open_store(s3_uri, create=False, endpoint=proxy.endpoint)
        assert isinstance(there, S3Store)

        def one_by_one() -> list[str]:
            pages = there._client.get_paginator("list_objects_v2")
            key = f"{there.prefix}/{folder}"
            return [one["Key"] for page in pages.paginate(Bucket=there.bucket, Prefix=key) for one in page["Contents"]]

        rounds = []
        for _ in range(3):
            took, found = timed(lambda: [entry.name for entry in there.list(folder)])
            assert found == sorted(names)
            bare, known = timed(one_by_one)
            assert len(known) == SHARDS
            rounds.append((took, bare))
    best, before = (min(times, key=lambda one: one.wall) for times in zip(*rounds, strict=True))
    print(f"\n{SHARDS} names at 150 ms a page: {best}; one page after the other {before}", flush=True)
    assert best.wall < before.wall
