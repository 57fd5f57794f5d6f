"""A disk without room (a real one): a paragraph and exit code 5, nothing half-written is taken for whole, and with room
the same command goes on and gives the bytes of a run that was never disturbed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from infra.documents import digest_file
from infra.errors import Refused
from infra.records.manifest import Manifest
from infra.store.base import Store
from infra.store.local import LocalStore
from infra.store.opening import open_store
from pipelines.engine.console import Console
from pipelines.engine.execute import Execution
from pipelines.engine.graph import resolve
from pipelines.engine.ray_shards import perform
from pipelines.select.stage import FeatureStage, Select
from tests.fixtures.disk import Disk
from tests.fixtures.stages import RULES, Data, download, source
from tests.pipelines.engine.test_graph import Double, Numbers

FULL = r"No space left on device\. Make room there, then run again"


def committed(store: Store, stage: object, *inputs: Manifest) -> Manifest:
    """As the executor does a stage, here."""
    resolved = resolve(stage, inputs, store)
    manifest = resolved.manifest([perform(stage, action, store) for action in resolved.todo])
    manifest.save(store)
    return manifest


def check_whole(store: LocalStore) -> None:
    """Every object is what its name says; nothing lies in tmp/."""
    for entry in store.list("objects/"):
        assert digest_file(store.local(entry.name)) == entry.name.rpartition("/")[2]
    assert list((store.root / "tmp").iterdir()) == []


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_what_finds_no_room_is_not_put_and_leaves_nothing(disk: Disk, tmp_path: Path, kind: str) -> None:
    store = open_store(str(disk.root / "store"))
    large = os.urandom(1 << 20)
    (tmp_path / "large").write_bytes(large)
    disk.fill(leave=512 << 10)
    with pytest.raises(Refused, match=FULL) as refused:
        store.put_new("objects/large", large if kind == "bytes" else tmp_path / "large")
    assert refused.value.code == 5
    assert [path for path in disk.files()] == []
    assert not store.exists("objects/large")
    disk.free()
    assert store.put_new("objects/large", large)
    assert store.get("objects/large") == large


def test_a_disk_without_room_for_one_more_file_is_told_by_every_write(disk: Disk) -> None:
    store = open_store(str(disk.root / "store"))
    disk.take_names()
    for refusing in (
        lambda: store.put_new("a", b""),
        lambda: store.scratch().__enter__(),
        lambda: open_store(store.uri),
    ):
        with pytest.raises(Refused, match=FULL) as refused:
            refusing()
        assert refused.value.code == 5
    disk.free()
    assert store.put_new("a", b"")


@pytest.mark.slow
def test_every_stage_says_that_its_disk_is_full_and_with_room_goes_on_to_the_same_bytes(disk: Disk, data: Data) -> None:
    store = open_store(str(disk.root / "store"))
    assert isinstance(store, LocalStore)
    stages = (
        (source(data.rows), (), data.source),
        (download(data.server.port), (data.source,), data.download),
        (FeatureStage("filter", RULES), (data.download,), data.looks),
        (Select("filter", RULES), (data.looks, data.download), data.filter),
    )
    for stage, inputs, expected in stages:
        made, leave, told = None, 0, list[Refused]()
        while made is None:
            disk.fill(leave)
            try:
                made = committed(store, stage, *inputs)
            except Refused as refused:
                told.append(refused)
                leave += max(4096, leave // 2)
            check_whole(store)
        assert made.body == expected.body
        assert told
        assert {refused.code for refused in told} == {5}
        assert all(re.search(FULL, str(refused)) for refused in told)


def test_a_full_cache_of_s3_objects_is_told_and_leaves_no_half_copy(disk: Disk, s3_uri: str) -> None:
    store = open_store(s3_uri, cache=disk.root / "cache")
    large = os.urandom(1 << 20)
    store.put_new("objects/large", large)
    disk.fill(leave=512 << 10)
    with pytest.raises(Refused, match=rf"copies of S3 objects are kept: {FULL}.*UNCLIP_CACHE_GB") as refused:
        store.local("objects/large")
    assert refused.value.code == 5
    assert disk.files() == []
    disk.free()
    assert store.local("objects/large").read_bytes() == large


def test_a_disk_that_is_too_full_to_start_ray_is_told_as_well(disk: Disk, tmp_path: Path) -> None:
    def connect() -> NoReturn:
        (disk.root / "session").write_bytes(bytes(1 << 20))
        raise AssertionError("there was room")

    disk.fill(leave=0)
    stages = [Numbers({"numbers": [1]}), Double({}, kind="task", how=SimpleNamespace(cpus=1))]
    work = Execution(open_store(str(tmp_path / "store")), stages, connect, Console([]))
    with pytest.raises(Refused, match=rf"double: .*{FULL}") as refused:
        work.run({"numbers", "double"})
    assert refused.value.code == 5


@pytest.mark.slow
@pytest.mark.parametrize("full", ["store", "TMPDIR"])
def test_the_command_line_says_it_in_a_paragraph(disk: Disk, tmp_path: Path, full: str) -> None:
    places = {"store": tmp_path / "store", "TMPDIR": tmp_path / "temporary", full: disk.root / "folder"}
    for folder in places.values():
        folder.mkdir()
    disk.fill(leave=8192)  # so that Python does not look for another temporary folder
    ran = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "run", "tiny", "--until", "source", "--store", places["store"]],
        env={**os.environ, "TMPDIR": str(places["TMPDIR"])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 5, ran.stderr
    assert ran.stderr.startswith("unclip: ")
    assert "No space left on device. Make room there, then run again" in ran.stderr
    assert "Traceback" not in ran.stderr
