"""S3 that answers with errors, stalls, hangs up or breaks off in the middle: a real server behind a proxy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

import infra.store.s3
import infra.store.s3_client
from infra.errors import NotFound, Refused
from infra.store.base import Store
from infra.store.opening import open_store
from infra.store.s3 import S3Store
from tests.fixtures.faulty_s3 import Fault, FaultyS3, Request, at_first, at_random, unharmed

SMALL = bytes(range(256)) * 40
ALWAYS = 10_000


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Waits less long for an answer than the proxy stalls, and tries three times."""
    monkeypatch.setattr(infra.store.s3, "PATIENCE_S", 0.25)
    monkeypatch.setattr(infra.store.s3, "ATTEMPTS", 3)
    infra.store.s3_client.client_for.cache_clear()
    yield
    infra.store.s3_client.client_for.cache_clear()


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file that goes in three parts, the smallest that S3 takes."""
    monkeypatch.setattr(infra.store.s3, "_SINGLE", 5 << 20)
    monkeypatch.setattr(infra.store.s3, "_PART", 5 << 20)
    path = tmp_path / "large"
    path.write_bytes(os.urandom((10 << 20) + 7))
    return path


def uploads(s3_endpoint: str, store: Store) -> list[str]:
    """Keys of uploads in parts that were begun and neither finished nor given up."""
    assert isinstance(store, S3Store)
    listed = boto3.client("s3", endpoint_url=s3_endpoint).list_multipart_uploads(Bucket=store.bucket)
    return [upload["Key"] for upload in listed.get("Uploads", [])]


def opened(uri: str, proxy: FaultyS3) -> S3Store:
    store = open_store(uri, endpoint=proxy.endpoint)
    assert isinstance(store, S3Store)
    return store


ASKED: dict[str, tuple[Callable[[Store], Any], Any]] = {
    "get": (lambda store: store.get("there"), SMALL),
    "get of a range": (lambda store: store.get("there", 100, 5000), SMALL[100:5100]),
    "local": (lambda store: store.local("there").read_bytes(), SMALL),
    "list": (lambda store: [entry.name for entry in store.list("th")], ["there"]),
    "exists": (lambda store: (store.exists("there"), store.exists("nowhere")), (True, False)),
    "put": (lambda store: (store.put_new("new", SMALL), store.get("new")), (True, SMALL)),
    "put of what is there": (lambda store: store.put_new("there", SMALL), True),
    "put of others": (lambda store: store.put_new("there", SMALL[1:]), False),
    "delete": (lambda store: (store.delete("there"), store.exists("there")), (None, False)),
}


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault is not Fault.STALL])
def test_what_fails_twice_is_done_at_the_third_attempt(s3_uri: str, proxy: FaultyS3, fault: Fault) -> None:
    store = opened(s3_uri, proxy)
    for name, (ask, expected) in ASKED.items():
        proxy.plan = unharmed
        store.delete("new")
        store.delete("there")
        store.put_new("there", SMALL)
        proxy.asked.clear()
        proxy.plan = at_first(fault, times=2)
        assert ask(store) == expected, name
    assert proxy.happened[fault] >= 2


@pytest.mark.usefixtures("impatient")
def test_a_server_that_says_nothing_is_asked_again(s3_uri: str, proxy: FaultyS3) -> None:
    store = opened(s3_uri, proxy)
    proxy.plan = at_first(Fault.STALL, part="objects/")
    assert store.put_new("objects/new", SMALL)
    assert store.get("objects/new") == SMALL
    assert proxy.happened[Fault.STALL] == 2
    proxy.plan = at_first(Fault.STALL, method="PUT", times=ALWAYS)
    with pytest.raises(Refused, match="does not answer") as refused:
        store.put_new("objects/never", SMALL)
    assert refused.value.code == 5
    assert not store.exists("objects/never")


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.RESET, Fault.HALF, Fault.LOST])
@pytest.mark.parametrize("step", ["?uploads", "partNumber=2", "?uploadId="])
def test_an_upload_in_parts_survives_a_fault_at_every_step(
    s3_endpoint: str, s3_uri: str, proxy: FaultyS3, parts: Path, step: str, fault: Fault
) -> None:
    store = opened(s3_uri, proxy)
    proxy.plan = at_first(fault, part=step)
    assert store.put_new("objects/large", parts)
    assert open_store(s3_uri).local("objects/large").read_bytes() == parts.read_bytes()
    left = uploads(s3_endpoint, store)
    assert left == (["some/prefix/objects/large"] if (step, fault) == ("?uploads", Fault.LOST) else [])  # never named


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.SLOW_DOWN, Fault.RESET, Fault.HALF])
def test_what_never_succeeds_is_refused_and_leaves_no_name(s3_uri: str, proxy: FaultyS3, fault: Fault) -> None:
    store = opened(s3_uri, proxy)
    proxy.plan = at_first(fault, method="PUT", times=ALWAYS)
    with pytest.raises(Refused) as refused:
        store.put_new("objects/never", SMALL)
    assert refused.value.code == 5
    assert "\n" not in str(refused.value)
    assert not open_store(s3_uri).exists("objects/never")


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.SLOW_DOWN])
def test_a_server_that_fails_as_a_run_begins_is_no_mistake_of_the_user(
    s3_uri: str, proxy: FaultyS3, fault: Fault
) -> None:
    proxy.plan = at_first(fault, method="GET", times=ALWAYS)
    for create in (False, True):
        with pytest.raises(Refused, match=rf"its server fails just now .*{fault}.*run again later") as refused:
            open_store(s3_uri, create=create, endpoint=proxy.endpoint)
        assert refused.value.code == 5


def test_half_a_body_is_never_a_copy(s3_uri: str, proxy: FaultyS3, tmp_path: Path) -> None:
    store = opened(s3_uri, proxy)
    store.put_new("objects/some", SMALL)
    proxy.plan = at_first(Fault.CUT, part="objects/some", times=ALWAYS)
    for read in (store.get, store.local):
        with pytest.raises(Refused, match="does not answer") as refused:
            read("objects/some")
        assert refused.value.code == 5
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    proxy.plan = unharmed
    assert store.local("objects/some").read_bytes() == SMALL


def test_a_part_that_never_succeeds_gives_the_upload_up(
    s3_endpoint: str, s3_uri: str, proxy: FaultyS3, parts: Path
) -> None:
    store = opened(s3_uri, proxy)
    proxy.plan = at_first(Fault.ERROR, part="partNumber=2", times=ALWAYS)
    with pytest.raises(Refused) as refused:
        store.put_new("objects/large", parts)
    assert refused.value.code == 5
    assert not store.exists("objects/large")
    assert uploads(s3_endpoint, store) == []


KILLED = """
import sys
from pathlib import Path
import infra.store.s3
from infra.store.opening import open_store
infra.store.s3._SINGLE = infra.store.s3._PART = 5 << 20
open_store(sys.argv[1], endpoint=sys.argv[2]).put_new("objects/large", Path(sys.argv[3]))
"""


def test_an_upload_whose_process_was_killed_is_no_data_and_is_given_up_a_day_later(
    s3_endpoint: str, s3_uri: str, proxy: FaultyS3, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = subprocess.Popen([sys.executable, "-c", KILLED, s3_uri, proxy.endpoint, parts])

    def kill_at_the_second_part(request: Request) -> None:
        if "partNumber=2" in request.path:
            running.kill()

    proxy.plan = kill_at_the_second_part
    assert running.wait() == -9
    store = open_store(s3_uri)
    assert not store.exists("objects/large")
    assert [entry.name for entry in store.list("objects/")] == []
    with pytest.raises(NotFound):
        store.get("objects/large")
    assert len(uploads(s3_endpoint, store)) == 1  # it might be another run's, which goes on
    elsewhere = f"s3://{s3_uri.split('/')[2]}/some/prefix-of-another"
    monkeypatch.setattr(infra.store.s3, "ABANDONED_S", -60)
    open_store(elsewhere)
    open_store(s3_uri, create=False)
    assert len(uploads(s3_endpoint, store)) == 1
    open_store(s3_uri)
    assert uploads(s3_endpoint, store) == []
    assert store.put_new("objects/large", parts)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_under_faults_at_random_a_store_holds_just_what_was_put(s3_uri: str, proxy: FaultyS3, seed: int) -> None:
    store = opened(s3_uri, proxy)
    proxy.plan = at_random(seed, 0.3)
    names = [f"objects/{number}" for number in range(20)]
    for number, name in enumerate(names):
        assert store.put_new(name, SMALL[number:])
        assert not store.put_new(name, SMALL[number + 1 :])
    found = {entry.name: entry.bytes for entry in store.list("objects/")}
    assert found == {name: len(SMALL) - number for number, name in enumerate(names)}
    assert all(store.local(name).read_bytes() == SMALL[number:] for number, name in enumerate(names))
    assert proxy.happened.total() > 20
