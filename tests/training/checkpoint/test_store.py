from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from infra.store.local import LocalStore
from training.checkpoint.store import Checkpoints


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "store")
    store.check(create=True)
    return store


def put(checkpoints: Checkpoints, samples: int, text: str = "weights") -> bool:
    with checkpoints.store.scratch() as folder:
        (folder / "a").write_text(f"{text} at {samples}")
        (folder / "below").mkdir()
        (folder / "below" / "b").write_text("more")
        return checkpoints.save(samples, folder, {"skipped": samples % 7})


def damage(store: LocalStore, name: str) -> None:
    path = store.local(name)
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def test_the_newest_checkpoint_is_found_with_its_files_and_counters(store):
    checkpoints = Checkpoints(store, "key", 3)
    assert checkpoints.newest() is None
    for samples in (8, 16, 120):
        assert put(checkpoints, samples)
    found = checkpoints.newest()
    assert (found.samples, found.head) == (120, {"skipped": 1})
    assert {name: path.read_text() for name, path in found.files.items()} == {"a": "weights at 120", "below/b": "more"}


def test_checkpoints_of_another_fit_are_not_found(store):
    put(Checkpoints(store, "key", 1), 8)
    assert Checkpoints(store, "ke", 1).newest() is None


@pytest.mark.parametrize("name", ["a", "below/b", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(store, caplog, name):
    checkpoints = Checkpoints(store, "key", 1)
    put(checkpoints, 8)
    put(checkpoints, 16)
    damage(store, f"checkpoints/key/000000000016-1/{name}")
    assert checkpoints.newest().samples == 8
    assert "000000000016-1" in caplog.text


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), which=st.sampled_from(["a", "below/b", "manifest.json"]))
def test_a_checkpoint_cut_at_any_byte_is_never_loaded_and_the_one_before_is(tmp_path_factory, share, which):
    store = LocalStore(tmp_path_factory.mktemp("cut"))
    store.check(create=True)
    checkpoints = Checkpoints(store, "key", 1)
    put(checkpoints, 8)
    put(checkpoints, 16)
    path = store.local(f"checkpoints/key/000000000016-1/{which}")
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert checkpoints.newest().samples == 8


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_manifest_with_a_flipped_bit_is_not_believed(tmp_path_factory, share, bit):
    store = LocalStore(tmp_path_factory.mktemp("flipped"))
    store.check(create=True)
    checkpoints = Checkpoints(store, "key", 1)
    put(checkpoints, 8)
    path = store.local("checkpoints/key/000000000008-1/manifest.json")
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    at = int(share * len(data))
    assume(b'"digest":' not in data[max(0, at - 9) : at + 10])  # without that name it is an earlier release's
    data[at] ^= 1 << bit
    path.write_bytes(data)
    assert checkpoints.newest() is None


def test_the_checkpoint_where_a_metric_was_least_is_kept_beside_the_newest(store):
    checkpoints = Checkpoints(store, "key", 1, keep=1, best="loss")
    for samples, loss in ((8, 3.0), (16, 1.0), (24, 2.0), (32, None), (40, 4.0)):
        with store.scratch() as folder:
            (folder / "a").write_text(str(samples))
            assert checkpoints.save(samples, folder, {"metrics": {} if loss is None else {"loss": loss}})
    names = {entry.name.split("/")[2] for entry in store.list("checkpoints/key/")}
    assert names == {"000000000016-1", "000000000040-1"}


def test_a_checkpoint_of_another_job_is_passed_over(store, caplog):
    put(Checkpoints(store, "key", 1, job="one"), 8)
    assert Checkpoints(store, "key", job="one").newest().samples == 8
    assert Checkpoints(store, "key").newest().samples == 8
    assert Checkpoints(store, "key", job="another").newest() is None
    assert "of another job" in caplog.text


def test_a_checkpoint_without_its_manifest_does_not_exist(store):
    checkpoints = Checkpoints(store, "key", 1)
    put(checkpoints, 8)
    store.put_new("checkpoints/key/000000000016-1/a", b"written, then the writer died")
    assert checkpoints.newest().samples == 8


def test_two_checkpoints_are_kept_and_what_is_older_goes(store):
    checkpoints = Checkpoints(store, "key", 1)
    store.put_new("checkpoints/key/000000000004-1/a", b"written, then the writer died")
    store.put_new("checkpoints/key/stop-9", b"stop")
    for samples in (8, 16, 24, 32):
        put(checkpoints, samples)
    folders = {entry.name.split("/")[2] for entry in store.list("checkpoints/key/")}
    assert folders == {"000000000024-1", "000000000032-1", "stop-9"}


def test_of_two_writers_at_one_place_the_later_lease_is_believed(store):
    put(Checkpoints(store, "key", 2), 8, "old")
    put(Checkpoints(store, "key", 10), 8, "new")
    assert Checkpoints(store, "key").newest().files["a"].read_text() == "new at 8"


def test_other_bytes_under_the_same_name_are_never_committed(store, caplog):
    checkpoints = Checkpoints(store, "key", 1)
    store.put_new("checkpoints/key/000000000008-1/a", b"of an earlier attempt")
    assert not put(checkpoints, 8)
    assert checkpoints.newest() is None
    assert "other bytes" in caplog.text


def test_a_discarded_fit_leaves_nothing(store):
    checkpoints = Checkpoints(store, "key", 1)
    put(checkpoints, 8)
    put(checkpoints, 16)
    checkpoints.discard()
    assert list(store.list("checkpoints/")) == []


def test_the_driver_can_deliver_a_model_without_importing_torch_or_ray():
    code = "import sys, training.launch; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
