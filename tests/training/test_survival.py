"""A store that is gone for a while, in the midst of a fit: a real S3 server behind a proxy that resets all connections,
and a real disk without room. Training goes on, and ends with the bytes of a fit that nobody disturbed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import Unavailable
from infra.store.base import Store
from infra.store.opening import open_store
from infra.tracking.monitor import NullMonitor
from tests.fixtures.disk import Disk
from tests.fixtures.faulty_s3 import Fault, FaultyS3, Request, unharmed
from tests.fixtures.fits import Tiny, tiny
from training.checkpoint.store import Checkpoints
from training.job import FitHow, Job
from training.launch import train_local
from training.preemption import StopFlag

STEPS = 24
SHORT = {"steps": STEPS, "batch": 6, "micro": 3, "warmup": 3, "window": 3}
FROM, TO = 14, 20
"""Steps between which the store is gone."""
OFTEN = FitHow(checkpoint_seconds=0, store_wait_s=60)


def gone(request: Request) -> Fault:
    """The plan of a server that is not there."""
    return Fault.RESET


def bytes_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def fit(job: Job, how: FitHow, store: Store, out: Path, at: dict[int, Callable[[], None]]) -> bytes:
    """A fit that calls `at` before the update of those steps; the bytes of its model."""
    step = 0

    def stop() -> bool:
        nonlocal step
        step += 1
        at.get(step, lambda: None)()
        return False

    train_local(job, how, store, out, NullMonitor(), stop=stop)
    return bytes_of(out)


def wait_for_a_checkpoint(store: Store, job: Job) -> None:
    """Returns once the fit, which saves beside its steps, has saved one."""
    until = time.monotonic() + 120
    while Checkpoints(store, job.key).newest() is None:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, bytes]:
    """A store, and the model that a fit on it gives."""
    folder = tmp_path_factory.mktemp("undisturbed")
    data = tiny(folder / "store")
    return data, fit(data.job("prior", **SHORT), FitHow(), data.store, folder / "out", {})


def copied(data: Tiny, store: Store) -> Store:
    """That store, with all that the data have."""
    for name in [entry.name for entry in data.store.list("") if not entry.name.startswith("checkpoints/")]:
        store.put_new(name, data.store.local(name))
    return store


def test_training_goes_on_while_the_store_does_not_answer(undisturbed, s3_uri, proxy: FaultyS3, tmp_path):
    data, expected = undisturbed
    store = copied(data, open_store(s3_uri, endpoint=proxy.endpoint))
    job, newest = data.job("prior", **SHORT), []

    def note() -> None:
        proxy.plan = unharmed
        newest.append(Checkpoints(store, job.key).newest())

    def go() -> None:
        wait_for_a_checkpoint(store, job)
        proxy.plan = gone

    assert fit(job, OFTEN, store, tmp_path / "out", {FROM: go, TO: note}) == expected
    assert proxy.happened[Fault.RESET] > 0
    # Six steps were taken meanwhile, and the newest checkpoint is from before or of the one that waited.
    assert newest[0].samples <= FROM * SHORT["batch"]


def test_a_fit_whose_store_stays_away_ends_and_goes_on_from_what_is_there(undisturbed, s3_uri, proxy, tmp_path):
    data, expected = undisturbed
    store = copied(data, open_store(s3_uri, endpoint=proxy.endpoint))
    job = data.job("prior", **SHORT)

    def go() -> None:
        wait_for_a_checkpoint(store, job)
        proxy.plan = gone

    with pytest.raises(Unavailable, match="does not answer") as caught:
        fit(job, FitHow(checkpoint_seconds=0, store_wait_s=0), store, tmp_path / "first", {FROM: go})
    assert caught.value.code == 5
    proxy.plan = unharmed
    found = Checkpoints(store, job.key).newest()
    assert found is not None
    assert 0 < found.samples <= FROM * SHORT["batch"]
    assert fit(job, FitHow(), store, tmp_path / "second", {}) == expected


def test_rows_that_cannot_be_read_just_now_are_waited_for(undisturbed, s3_uri, proxy, tmp_path):
    data, expected = undisturbed
    store = copied(data, open_store(s3_uri, endpoint=proxy.endpoint, cache=tmp_path / "first"))
    cold = open_store(s3_uri, endpoint=proxy.endpoint, cache=tmp_path / "cold")
    proxy.plan = gone
    back = threading.Timer(1.0, lambda: setattr(proxy, "plan", unharmed))
    back.start()
    assert fit(data.job("prior", **SHORT), OFTEN, cold, tmp_path / "out", {}) == expected
    assert proxy.happened[Fault.RESET] > 0
    assert store.uri == cold.uri


def test_training_goes_on_while_the_disk_is_full(undisturbed, disk: Disk, tmp_path, caplog):
    data, expected = undisturbed
    store = copied(data, open_store(str(disk.root / "store")))
    job, newest = data.job("prior", **SHORT), []

    def fill() -> None:
        wait_for_a_checkpoint(store, job)
        disk.fill(leave=4096)

    def free() -> None:
        disk.free()
        newest.append(Checkpoints(store, job.key).newest())

    with caplog.at_level(logging.WARNING):
        assert fit(job, OFTEN, store, tmp_path / "out", {FROM: fill, TO: free}) == expected
    assert newest[0].samples <= FROM * SHORT["batch"]
    assert "No space left on device. Make room there" in caplog.text
    assert "It is waited for, up to 60 s." in caplog.text


def test_a_disk_that_stays_full_ends_a_fit_that_goes_on_once_there_is_room(undisturbed, disk: Disk, tmp_path):
    data, expected = undisturbed
    store = copied(data, open_store(str(disk.root / "store")))
    job = data.job("prior", **SHORT)

    def fill() -> None:
        wait_for_a_checkpoint(store, job)
        disk.fill(leave=4096)

    with pytest.raises(Unavailable, match=r"No space left on device\. Make room there") as caught:
        fit(job, FitHow(checkpoint_seconds=0, store_wait_s=0), store, tmp_path, {FROM: fill})
    assert caught.value.code == 5
    disk.free()
    assert list((disk.root / "store" / "tmp").iterdir()) == []
    found = Checkpoints(store, job.key).newest()
    assert found is not None
    assert 0 < found.samples <= FROM * SHORT["batch"]
    assert fit(job, FitHow(), store, tmp_path / "second", {}) == expected


def test_a_finished_model_waits_for_room(undisturbed, disk: Disk, tmp_path):
    data, expected = undisturbed
    store = copied(data, open_store(str(disk.root / "store")))
    job, how = data.job("prior", **SHORT), FitHow(checkpoint_seconds=1000, store_wait_s=60)
    back = threading.Timer(2.0, disk.free)

    def fill() -> None:
        disk.fill(leave=4096)
        back.start()

    assert fit(job, how, store, tmp_path / "out", {STEPS: fill}) == expected


def test_a_store_that_does_not_answer_asks_nobody_to_stop(s3_uri, proxy, monkeypatch):
    monkeypatch.setattr("training.preemption.POLL_SECONDS", 0.05)
    store = open_store(s3_uri, endpoint=proxy.endpoint)
    proxy.plan = gone
    flag = StopFlag(store, "checkpoints/key/stop-1")
    assert not flag.requested()
    assert not flag()
    proxy.plan = unharmed
    store.put_new("checkpoints/key/stop-1", b"stop")
    assert flag._asked.wait(20)
    assert flag()
