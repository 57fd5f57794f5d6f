"""What tests/proofs/faults.py plays on: a cluster, stores of both kinds, runs that stop where told to, kills."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from infra.records.manifest import Manifest, Record
from infra.records.objects import object_name
from infra.store.base import Store
from infra.store.opening import open_store
from tests.fixtures.faulty_s3 import FaultyS3, failing
from tests.fixtures.holding import ROOT, Holding, Step, drawn, release
from tests.fixtures.nodes import Nodes, nodes
from tests.fixtures.ports import free_port
from tests.fixtures.s3 import ENVIRONMENT, SCRIPT

STAGES = ("source", "download", "filter-look", "filter", "embed", "curate-look", "curate", "statistics")
"""Of the data, in their order. CLIP, which is trained between filter and embed, is no data, and nobody disturbs it."""
SLOW = ("--set", "download.timeout_s=60")
"""The world's slow links are to be slow, not given up, on a machine that does ten other things."""


@dataclass(frozen=True)
class Part:
    """Some of the data's stages, which one run does; what comes before them is there, from an undisturbed run."""

    name: str
    stages: tuple[str, ...]
    options: tuple[str, ...]
    """Of `unclip run tiny`."""
    before: tuple[str, ...] = ()


EARLY = Part("early", STAGES[:4], ("--until", "filter", *SLOW))
LATE = Part("late", STAGES[4:], ("--until", "statistics"), (*STAGES[:4], "clip"))
TARS = Part("tars", STAGES[:2], ("--until", "download"))
"""Tars that exist already: `gather` stands in download's place. `Scene.options` says where they are."""


@dataclass
class Scene:
    """A cluster of a head and two nodes, an S3 server behind a proxy, and a folder for all that runs leave."""

    folder: Path
    cluster: Nodes
    proxy: FaultyS3
    direct: str
    """The S3 server's own URL."""
    environment: dict[str, str]
    holding: Holding

    @property
    def whole(self) -> str:
        """The store of the undisturbed run."""
        return str(self.folder / "undisturbed")

    @property
    def gathered(self) -> str:
        """The store of the undisturbed run over tars."""
        return str(self.folder / "undisturbed-tars")

    def new(self, kind: str, part: Part) -> str:
        """The URI of a new store, a "folder" or a bucket ("s3"), that has what comes before a part."""
        name = f"store-{uuid.uuid4().hex[:8]}"
        uri = str(self.folder / name)
        if kind == "s3":
            import boto3

            boto3.client("s3", endpoint_url=self.direct).create_bucket(Bucket=name)
            uri = f"s3://{name}/unclip"
        self.give(open_store(uri, endpoint=self.direct, cache=self.folder / "cache"), part)
        return uri

    def give(self, store: Store, part: Part) -> None:
        """Puts what comes before a part into a store: documents, and the objects that they name."""
        if not part.before:
            return
        whole = open_store(self.whole, create=False)
        for name, data in documents(whole, part.before).items():
            objects = [_version(name)]
            if name.startswith("records/"):
                objects = [file.sha256 for file in Record.from_json(data, name).files.values()]
            for sha in objects:
                store.put_new(object_name(sha), whole.local(object_name(sha)))
            store.put_new(name, data)

    def options(self, part: Part) -> tuple[str, ...]:
        """Options of a run of that part."""
        return (*part.options, *(("--set", f"source.tars={self.tars()}") if part is TARS else ()))

    def tars(self) -> Path:
        """The tars that the undisturbed run has made, as ones that exist already."""
        folder = self.folder / "tars"
        if not folder.exists():
            folder.mkdir()
            whole = open_store(self.whole, create=False)
            for name, data in documents(whole, ("download",)).items():
                if name.startswith("records/"):
                    sha = Record.from_json(data).sha("images.tar")
                    shutil.copy(whole.local(object_name(sha)), folder / f"{sha[:8]}.tar")
        return folder

    def opened(self, uri: str) -> Store:
        """A store as one who was not there sees it: without proxy, without copies made before."""
        cache = self.folder / f"cache-{uuid.uuid4().hex[:8]}"
        return open_store(uri, create=False, endpoint=self.direct, cache=cache)

    def remove(self, uri: str) -> None:
        """A folder; buckets go with their server."""
        if not uri.startswith("s3://"):
            shutil.rmtree(uri, ignore_errors=True)

    def start(self, uri: str, part: Part) -> subprocess.Popen[bytes]:
        """`unclip run tiny` on the cluster, to the end of a part; its output goes to run.log."""
        command = [sys.executable, "-m", "pipelines.cli", "run", "tiny", "--store", uri]
        command += ["--address", self.cluster.address, *self.options(part)]
        with self.log.open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **self.environment}, cwd=ROOT)

    @property
    def log(self) -> Path:
        """What the last run said."""
        return self.folder / "run.log"

    def finish(self, uri: str, part: Part, codes: Sequence[int] = (0,)) -> int:
        """A run to its end; its exit code. Raises, with what it said, for one that is not expected."""
        run = self.start(uri, part)
        self.holding.wait(run)
        return self.expect(run, codes)

    def expect(self, run: subprocess.Popen[bytes], codes: Sequence[int]) -> int:
        """The exit code of a run that has ended; raises, with what it said, for another than these, or a traceback."""
        code, said = run.wait(), self.log.read_text()
        if code not in codes or "Traceback" in said:
            raise SystemExit(f"a run ended with {code}, not {codes}:\n{said[-5000:]}")
        return code


@contextlib.contextmanager
def scene(folder: Path) -> Iterator[Scene]:
    """Starts the cluster and the S3 server; ends what it started."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= ENVIRONMENT
    port = free_port()
    direct = f"http://127.0.0.1:{port}"
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, [SCRIPT, "stop", folder / "rgw"], check=True)
        subprocess.run([SCRIPT, "start", folder / "rgw", str(port)], check=True)
        proxy = stack.enter_context(failing(direct, stall_s=70.0))
        holding = Holding(folder / "held")
        environment = {
            **holding.environment,
            "XDG_CACHE_HOME": str(folder / "cache"),
            "XDG_STATE_HOME": str(folder / "state"),
            "AWS_ENDPOINT_URL": proxy.endpoint,
        }
        cluster = stack.enter_context(nodes(2, environment))
        yield Scene(folder, cluster, proxy, direct, environment, holding)


def kill(
    scene: Scene, uri: str, part: Part, victim: str, steps: dict[str, list[Step]], draw: random.Random
) -> tuple[Counter[str], int]:
    """Kills a driver, worker or node once in each stage, and runs to the end: the stages that were hit (a stage may
    come to fewer steps than in the undisturbed run), and how often the command was given again."""
    if victim == "driver":
        return _kill_drivers(scene, uri, part, steps, draw)
    where = {stage: [step for step in steps[stage] if step[0] == "perform"] for stage in part.stages}
    scene.holding.arm({stage: drawn(found, draw) for stage, found in where.items()})
    hit, again, code = Counter[str](), -1, 5
    while code:
        again += 1
        run = scene.start(uri, part)
        while found := scene.holding.wait(run):
            stage, pid = found
            if victim == "node":
                scene.cluster.kill(scene.cluster.of(pid) or draw.choice(scene.cluster.alive))
                scene.cluster.add()
                hit[stage] += 1
            elif victims := [pid] if pid != run.pid else scene.cluster.workers():
                os.kill(draw.choice(victims), signal.SIGKILL)
                hit[stage] += 1
            release(pid)
        code = scene.expect(run, (0, 5))
    return hit, again


def _kill_drivers(
    scene: Scene, uri: str, part: Part, steps: dict[str, list[Step]], draw: random.Random
) -> tuple[Counter[str], int]:
    hit: Counter[str] = Counter()
    for stage in part.stages:
        scene.holding.arm({stage: drawn(steps[stage], draw)})
        run = scene.start(uri, part)
        if (found := scene.holding.wait(run)) is None:
            scene.expect(run, (0,))
            continue
        hit[stage] += 1
        run.kill()
        run.wait()
        release(found[1])
    scene.holding.arm({})
    scene.finish(uri, part)
    return hit, hit.total()


def documents(store: Store, stages: Sequence[str]) -> dict[str, bytes]:
    """Every record and manifest of these stages: name → bytes."""
    names = [entry.name for prefix in ("records/", "manifests/") for entry in store.list(prefix)]
    return {name: store.get(name) for name in names if name.split("/")[1].rpartition("-")[0] in stages}


def check(scene: Scene, uri: str, part: Part) -> int:
    """Raises unless the store holds just the documents of the undisturbed run, every row once, and what its names say;
    the number of orphans, that is of objects that nothing refers to."""
    store, stages = scene.opened(uri), (*STAGES, "clip")
    undisturbed = open_store(scene.gathered if part is TARS else scene.whole, create=False)
    found, expected = documents(store, stages), documents(undisturbed, (*part.before, *part.stages))
    if different := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise SystemExit(f"{uri}: {len(different)} documents differ from the undisturbed run's: {different[:5]}")
    verify = [sys.executable, "-m", "pipelines.cli", "data", "verify", "--store", uri]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "AWS_ENDPOINT_URL": scene.direct}
    verified = subprocess.run(verify, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if verified.returncode:
        raise SystemExit(f"{uri}: data verify says\n{verified.stdout}{verified.stderr}")
    _check_rows(store, found)
    records = [Record.from_json(data, name) for name, data in found.items() if name.startswith("records/")]
    used = {_version(name) for name in found if name.startswith("manifests/")}
    used |= {file.sha256 for record in records for file in record.files.values()}
    return sum(entry.name.rpartition("/")[2] not in used for entry in store.list("objects/"))


def _version(manifest: str) -> str:
    """The version that the name of a manifest's head says."""
    return manifest.rpartition("/")[2].partition(".")[0]


def _check_rows(store: Store, found: dict[str, bytes]) -> None:
    """Raises unless each row of each slice is in the shard made of it, once and in its place."""
    rows = 0
    for name, data in found.items():
        if name.startswith("records/download-"):
            (slice_sha,) = json.loads(data)["action"]["inputs"]
            index = Record.from_json(data, name).sha("index.parquet")
            listed, fetched = (
                pq.read_table(store.local(object_name(sha)), columns=["uid"])["uid"].to_pylist()
                for sha in (slice_sha, index)
            )
            if listed != fetched:
                raise SystemExit(f"{name}: {len(listed)} rows were listed, {len(fetched)} are there, or others")
            rows += len(listed)
    sources = [_version(name) for name in found if name.startswith("manifests/source-")]
    total = sum(Manifest.load(store, version).states["listed"] for version in sources)
    if rows != total:
        raise SystemExit(f"{total} rows are in slices, {rows} in shards")
