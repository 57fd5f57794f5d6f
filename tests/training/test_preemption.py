from __future__ import annotations

import time
from pathlib import Path

import pytest

from infra.store.local import LocalStore
from training import preemption as leaving
from training.preemption import Draining, StopFlag


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "POLL_SECONDS", 0.01)


def test_a_worker_whose_node_is_drained_is_told_so_once_and_no_other():
    draining: dict[str, int] = {}
    here, there = (Draining(lambda: draining, node) for node in ("here", "there"))
    assert not here()
    draining["here"] = 1_700_000_000_000
    time.sleep(0.02)
    assert [here(), here(), there()] == [True, False, False]


def test_a_stop_is_seen_once_the_driver_has_asked_for_it(tmp_path: Path):
    store = LocalStore(tmp_path)
    store.check(create=True)
    stop = StopFlag(store, "checkpoints/key/stop-1")
    assert not stop()
    store.put_new("checkpoints/key/stop-2", b"stop")
    assert not stop.requested()
    assert not stop()
    store.put_new("checkpoints/key/stop-1", b"stop")
    assert stop.requested()
    deadline = time.monotonic() + 10
    while not stop() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stop()
