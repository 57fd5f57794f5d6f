"""A lease has one holder, and falls free when it is released, expires, or its holder dies on this host."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from infra.lease import Lease
from infra.process import Process
from infra.store.base import Store
from infra.store.opening import open_store


def test_a_lease_has_one_holder_until_it_is_released(store_uri: str) -> None:
    store = open_store(store_uri)
    lease = Lease.acquire(store, "work")
    assert lease
    assert lease.number == 1
    assert Lease.acquire(store, "work") is None
    assert Lease.acquire(store, "other work")
    lease.release()
    assert (second := Lease.acquire(store, "work"))
    assert second.number == 2


def _acquire(store: Store, start: object, answers: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    lease = Lease.acquire(store, "work")
    answers.put(lease.number if lease else None)  # type: ignore[attr-defined]
    start.wait()  # type: ignore[attr-defined]  # the winner must live while the others try


@pytest.mark.slow
def test_of_processes_that_race_for_a_lease_one_has_it(store_uri: str) -> None:
    store = open_store(store_uri)
    spawn = multiprocessing.get_context("spawn")
    start, answers = spawn.Barrier(3), spawn.Queue()
    racers = [spawn.Process(target=_acquire, args=(store, start, answers)) for _ in range(3)]
    for racer in racers:
        racer.start()
    assert sorted(str(answers.get(timeout=60)) for _ in racers) == ["1", "None", "None"]
    for racer in racers:
        racer.join()


def test_the_lease_of_a_killed_holder_is_free_at_once(store_uri: str) -> None:
    store = open_store(store_uri)
    script = (
        "import sys, time; from infra.lease import Lease; from infra.store.opening import open_store\n"
        "assert Lease.acquire(open_store(sys.argv[1]), 'work', ttl_s=3600)\n"
        "print('held', flush=True); time.sleep(600)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, store_uri], stdout=subprocess.PIPE)
    assert holder.stdout
    assert holder.stdout.readline() == b"held\n"
    assert Lease.acquire(store, "work") is None
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and not reaped yet
    assert (lease := Lease.acquire(store, "work"))
    assert lease.number == 2
    holder.wait()
    holder.stdout.close()


@pytest.mark.slow
def test_a_lease_from_another_host_expires_by_the_clock_unless_it_is_renewed(store_uri: str, monkeypatch) -> None:
    store = open_store(store_uri)
    elsewhere = Process("another host", 1, "0")
    with monkeypatch.context() as patch:
        patch.setattr(Process, "this", classmethod(lambda cls: elsewhere))
        lease = Lease.acquire(store, "work", ttl_s=3)
    assert lease
    for _ in range(4):
        time.sleep(1)
        assert lease.renew()
        assert Lease.acquire(store, "work") is None
    time.sleep(3.2)
    assert (other := Lease.acquire(store, "work", ttl_s=3))
    assert other.number == 2
    assert not lease.renew()
    assert other.renew()


def test_renewals_do_not_pile_up(store_uri: str) -> None:
    store = open_store(store_uri)
    lease = Lease.acquire(store, "work")
    assert lease
    for _ in range(5):
        lease.renew()
    assert Lease.acquire(store, "work") is None
    assert len(list(store.list("leases/work/"))) == 2


@pytest.mark.slow
def test_a_kept_lease_outlives_its_ttl_and_ends_with_its_context(store_uri: str) -> None:
    store = open_store(store_uri)
    lease = Lease.acquire(store, "work", ttl_s=2)
    assert lease
    with lease.kept() as lost:
        time.sleep(3)
        assert Lease.acquire(store, "work") is None
        assert not lost.is_set()
    assert Lease.acquire(store, "work")


def test_a_keeper_is_told_that_it_has_lost(tmp_path) -> None:
    store = open_store(str(tmp_path))
    lease = Lease.acquire(store, "work", ttl_s=0.4)
    assert lease
    store.put_new("leases/work/00000002.json", b"{}")
    with lease.kept() as lost:
        assert lost.wait(10)
    assert isinstance(lost, threading.Event)


def test_a_living_process_is_not_dead_and_its_number_used_again_is_another() -> None:
    this = Process.this()
    assert not this.dead()
    assert Process(this.host, this.pid, "an earlier start").dead()
    assert not Process("another host", this.pid, "0").dead()
