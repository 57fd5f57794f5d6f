"""What is particular to S3, against a real server (Ceph's gateway)."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from botocore.utils import parse_timestamp
from hypothesis import given
from hypothesis import strategies as st

import infra.store.s3
import infra.store.s3_client
from infra.errors import Refused
from infra.store.opening import open_store


class LosesFirstAnswer:
    """A relay to a server that passes the first PUT of an object on, and hangs up instead of answering."""

    def __init__(self, endpoint: str, name: bytes) -> None:
        self.server = urlsplit(endpoint)
        self.name, self.lost = name, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self.socket.accept()
            server = socket.create_connection((self.server.hostname, self.server.port))
            state = {"lose": False}
            threading.Thread(target=self._up, args=(client, server, state), daemon=True).start()
            threading.Thread(target=self._down, args=(client, server, state), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket, state: dict[str, bool]) -> None:
        while data := client.recv(1 << 16):
            if data.startswith(b"PUT") and self.name in data.split(b"\r\n")[0] and not self.lost:
                self.lost, state["lose"] = 1, True
            server.sendall(data)

    def _down(self, client: socket.socket, server: socket.socket, state: dict[str, bool]) -> None:
        while data := server.recv(1 << 16):
            if state["lose"] and not data.startswith(b"HTTP/1.1 100"):
                client.shutdown(socket.SHUT_RDWR)
                return
            client.sendall(data)


def test_a_put_whose_answer_was_lost_meets_its_own_object_and_has_won(s3_endpoint: str, s3_uri: str) -> None:
    relay = LosesFirstAnswer(s3_endpoint, b"lost")
    store = open_store(s3_uri, endpoint=relay.endpoint)
    assert store.put_new("lost", b"mine")
    assert relay.lost == 1
    assert not store.put_new("lost", b"theirs")


def test_a_file_larger_than_one_put_takes_goes_in_parts(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infra.store.s3, "_SINGLE", 6 << 20)
    monkeypatch.setattr(infra.store.s3, "_PART", 5 << 20)
    (tmp_path / "large").write_bytes(os.urandom((11 << 20) + 7))
    store = open_store(s3_uri)
    assert store.put_new("objects/large", tmp_path / "large")
    assert store.put_new("objects/large", tmp_path / "large")
    assert store.local("objects/large").read_bytes() == (tmp_path / "large").read_bytes()
    (tmp_path / "large").write_bytes(os.urandom((11 << 20) + 7))
    assert not store.put_new("objects/large", tmp_path / "large")


@contextmanager
def conflicts(
    store: infra.store.s3.S3Store,
    operation: str,
    times: int,
    status: int = 409,
    code: str = "ConditionalRequestConflict",
) -> Iterator[list[str]]:
    """The first `times` requests of an operation are answered with S3's 409 on the wire, and do not reach the server.

    Yields the methods of those requests. (The test server never answers so itself.)
    """
    answered: list[str] = []

    class Raw(io.BytesIO):
        def stream(self, *_: Any, **__: Any) -> Iterator[bytes]:
            yield self.read()

    def answer(request: Any, **_: Any) -> AWSResponse | None:
        if len(answered) >= times:
            return None
        answered.append(request.method)
        body = f"<Error><Code>{code}</Code><Message>on the wire</Message></Error>".encode()
        return AWSResponse(request.url, status, {"Content-Type": "application/xml"}, Raw(body))

    events, event = store._client.meta.events, f"before-send.s3.{operation}"
    events.register(event, answer)
    try:
        yield answered
    finally:
        events.unregister(event, answer)


def test_two_puts_that_meet_are_settled_after_a_wait(s3_uri: str, tmp_path: Path, monkeypatch) -> None:
    store = open_store(s3_uri)
    assert isinstance(store, infra.store.s3.S3Store)
    with conflicts(store, "PutObject", 2) as answered:
        assert store.put_new("objects/small", b"bytes")
    assert answered == ["PUT", "PUT"]
    waits: list[float] = []
    monkeypatch.setattr(infra.store.s3.S3Store._put.retry, "sleep", waits.append)  # type: ignore[attr-defined]
    with conflicts(store, "PutObject", 100) as answered, pytest.raises(Refused, match="others kept writing") as refused:
        store.put_new("objects/other", b"bytes")
    assert refused.value.code == 5
    assert len(answered) == 8
    assert len(waits) == 7
    assert 0 < sum(waits) <= 70


def test_an_upload_in_parts_that_meets_another_begins_again(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infra.store.s3, "_SINGLE", 6 << 20)
    monkeypatch.setattr(infra.store.s3, "_PART", 5 << 20)
    (tmp_path / "large").write_bytes(os.urandom((6 << 20) + 7))
    store = open_store(s3_uri)
    assert isinstance(store, infra.store.s3.S3Store)
    with conflicts(store, "CompleteMultipartUpload", 1) as answered:
        assert store.put_new("checkpoints/large", tmp_path / "large")
    assert answered == ["POST"]
    assert store.local("checkpoints/large").read_bytes() == (tmp_path / "large").read_bytes()
    left = boto3.client("s3", endpoint_url=store.endpoint).list_multipart_uploads(Bucket=store.bucket)
    assert left.get("Uploads", []) == []


@pytest.mark.parametrize("first", ["mine", "another's", "nobody's"])
def test_an_upload_in_parts_that_is_gone_is_settled_by_what_lies_there(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """Amazon's answer to joining the parts once more, where the answer to the first joining was lost."""
    monkeypatch.setattr(infra.store.s3, "_SINGLE", 6 << 20)
    (tmp_path / "mine").write_bytes(os.urandom((6 << 20) + 7))
    (tmp_path / "another's").write_bytes(os.urandom(100))
    store, other = open_store(s3_uri), open_store(s3_uri)
    assert isinstance(store, infra.store.s3.S3Store)

    def joined(**_: Any) -> None:
        if first != "nobody's":
            monkeypatch.setattr(infra.store.s3, "_SINGLE", 1 << 30)
            other.put_new("objects/large", tmp_path / first)

    store._client.meta.events.register_first("before-send.s3.CompleteMultipartUpload", joined)
    with conflicts(store, "CompleteMultipartUpload", 1, 404, "NoSuchUpload") as answered:
        if first == "nobody's":
            with pytest.raises(Refused, match="NoSuchUpload"):
                store.put_new("objects/large", tmp_path / "mine")
        else:
            assert store.put_new("objects/large", tmp_path / "mine") == (first == "mine")
    store._client.meta.events.unregister("before-send.s3.CompleteMultipartUpload", joined)
    assert answered == ["POST"]


def test_a_copy_is_fetched_once(s3_uri: str) -> None:
    store = open_store(s3_uri)
    store.put_new("objects/aa/some", b"bytes")
    first = store.local("objects/aa/some")
    fetched = first.stat().st_ino
    assert store.local("objects/aa/some").stat().st_ino == fetched
    assert not first.stat().st_mode & 0o222


def test_a_copy_whose_process_was_killed_half_way_is_swept(s3_uri: str, tmp_path: Path) -> None:
    open_store(s3_uri).put_new("objects/aa/some", b"bytes")
    script = (
        "import os, sys; from infra.store.opening import open_store\n"
        "store = open_store(sys.argv[1])\n"
        "os.replace = lambda *_: os.kill(os.getpid(), 9)\n"
        "store.local('objects/aa/some')\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, s3_uri], check=False)
    assert killed.returncode == -9
    assert len(list(tmp_path.glob("cache/unclip/s3/*/tmp/*"))) == 1
    store = open_store(s3_uri)
    assert list(tmp_path.glob("cache/unclip/s3/*/tmp/*")) == []
    assert store.local("objects/aa/some").read_bytes() == b"bytes"


def test_a_store_that_is_only_looked_at_stays_empty(s3_uri: str) -> None:
    assert list(open_store(s3_uri, create=False).list("")) == []


def test_a_server_that_does_not_answer_is_refused(s3_uri: str) -> None:
    with pytest.raises(Refused, match=r"127\.0\.0\.1:9 does not answer"):
        open_store(s3_uri, endpoint="http://127.0.0.1:9")


def test_a_bucket_that_does_not_exist_is_refused(s3_endpoint: str) -> None:
    with pytest.raises(Refused, match="no such bucket"):
        open_store("s3://no-such-bucket/x")
    with pytest.raises(Refused, match="'No_Bucket' is no name of a bucket"):
        open_store("s3://No_Bucket")


def test_wrong_credentials_are_refused(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    infra.store.s3_client.client_for.cache_clear()
    try:
        with pytest.raises(Refused, match="access denied"):
            open_store(s3_uri)
    finally:
        infra.store.s3_client.client_for.cache_clear()


def test_a_bucket_that_may_only_be_read_can_be_looked_at_and_not_run_on(s3_endpoint: str, s3_uri: str) -> None:
    bucket = s3_uri.split("/")[2]
    policy = (
        '{"Version": "2012-10-17", "Statement": [{"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject", '
        f'"Resource": "arn:aws:s3:::{bucket}/*"}}]}}'
    )
    boto3.client("s3", endpoint_url=s3_endpoint).put_bucket_policy(Bucket=bucket, Policy=policy)
    assert list(open_store(s3_uri, create=False).list("")) == []
    with pytest.raises(Refused, match=r"access denied .* for store\.json"):
        open_store(s3_uri)


class Plain(BaseHTTPRequestHandler):
    """A web server that is none of S3's; its class says what it answers."""

    status, body = 404, b"<html>no such page</html>"

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


@pytest.mark.parametrize(
    ("status", "body"),
    [(404, b"<html>no such page</html>"), (200, b"<html>welcome</p>"), (200, b"plain"), (418, b""), (400, b"\x00")],
)
def test_a_web_server_that_is_no_s3_is_a_users_mistake(
    status: int, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    answers = type("Answers", (Plain,), {"status": status, "body": body})
    with ThreadingHTTPServer(("127.0.0.1", 0), answers) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        with pytest.raises(Refused, match="AWS_ENDPOINT_URL") as caught:
            open_store("s3://bucket/prefix", create=False, endpoint=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert caught.value.code == 2


def test_the_cache_stays_below_its_bound_and_keeps_what_was_used_last(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNCLIP_CACHE_GB", "3e-6")  # 3000 bytes
    store = open_store(s3_uri, cache=tmp_path / "copies")
    for number in range(5):
        store.put_new(f"objects/{number}", bytes([number]) * 1000)
    copies = [store.local(f"objects/{number}") for number in range(4)]
    assert all(copy.exists() for copy in copies)  # above the bound, and all of it may be in use
    for number, copy in enumerate(copies):
        os.utime(copy, (hours_ago := time.time() - 7200 + number, hours_ago))
    store.local("objects/0")  # used again, without being fetched
    assert store.local("objects/4").read_bytes() == bytes([4]) * 1000
    assert [copy.exists() for copy in copies] == [True, False, False, True]
    assert store.local("objects/1").read_bytes() == bytes([1]) * 1000
    monkeypatch.setenv("UNCLIP_CACHE_GB", "much")
    with pytest.raises(Refused, match="UNCLIP_CACHE_GB is 'much'"):
        store.local("objects/2")


@given(st.datetimes(timezones=st.just(UTC)))
def test_a_time_in_an_answer_is_what_botocore_reads(time: datetime) -> None:
    listed = f"{time.replace(tzinfo=None).isoformat(timespec='milliseconds')}Z"
    headed = format_datetime(time.replace(microsecond=0), usegmt=True)
    for said in (listed, headed):
        assert infra.store.s3_client._time(said) == parse_timestamp(said)
