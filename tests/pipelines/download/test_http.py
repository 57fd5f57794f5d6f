"""Connections that are kept for the next request: when they are, when not, and what they never carry over."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from pipelines.download.guard import Fault, Guard
from pipelines.download.http import Connections
from tests.fixtures.web import BODY, Web, give, reset, serving, stay, trickle
from tests.pipelines.download.test_guard import certificate

EVIL = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
"""What a server may send behind an answer, and another row would take for its own."""


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as server:
        server.answers["/ok.png"] = stay
        yield server


@pytest.fixture
def guard(web: Web) -> Iterator[Guard]:
    made = Guard(user_agent="test/1", resolve={"*.web.test": f"127.0.0.1:{web.port}"}, allow=("127.0.0.1/32",))
    yield made
    made.close()


def body(guard: Guard, url: str = "http://a.web.test/ok.png", seconds: float = 5.0) -> bytes:
    return guard.fetch(url, max_bytes=1 << 20, seconds=seconds).body


def sockets() -> int:
    """Sockets that this process has open."""
    links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).startswith("socket:") for link in links if os.path.islink(link))


def test_requests_to_one_host_go_over_one_connection(web, guard):
    assert [body(guard) for _ in range(5)] == [BODY] * 5
    assert web.connections == 1
    assert len(web.seen) == 5


def test_each_host_and_port_has_connections_of_its_own(web, guard):
    for url in ("http://a.web.test/ok.png", "http://b.web.test/ok.png", "http://a.web.test:81/ok.png") * 2:
        body(guard, url)
    assert web.connections == 3
    assert [host for _, host, _ in web.seen] == ["a.web.test", "b.web.test", "a.web.test:81"] * 2


def test_redirects_are_followed_over_connections_that_are_there(web, guard):
    web.answers["/moved.png"] = lambda asked: stay(asked, 302, b"", Location="http://a.web.test/ok.png")
    body(guard)
    assert body(guard, "http://b.web.test/moved.png") == BODY
    assert web.connections == 2


def test_a_connection_is_not_used_once_its_host_lives_elsewhere(web, guard, monkeypatch):
    where = ["127.0.0.1", "127.0.0.1", "127.0.0.2"]

    def found(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (where.pop(0), port))]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    url = f"http://rebinding.test:{web.port}/ok.png"
    assert body(guard, url) == body(guard, url) == BODY
    with pytest.raises(Fault, match="not public") as fault:
        body(guard, url)
    assert fault.value.state == "refused_address"
    assert web.connections == 1


@pytest.mark.parametrize("ending", [give, reset, lambda asked: asked.wfile.write(b"SSH-2.0-server\r\n\r\n")])
def test_a_kept_connection_that_fails_is_no_fault_of_the_url(web, guard, ending):
    """The server hangs up behind its answer, or as soon as it is asked again, or talks nonsense then."""
    body(guard)
    kept = web.connections

    def once(asked: Any) -> None:
        web.answers["/next.png"] = stay
        ending(asked)

    web.answers["/next.png"] = once
    assert body(guard, "http://a.web.test/next.png") == BODY
    assert body(guard, "http://a.web.test/next.png") == BODY
    assert web.connections == kept + 1


def test_a_connection_that_was_just_made_is_not_tried_again(web, guard):
    web.answers["/reset.png"] = reset
    with pytest.raises(Fault) as fault:
        body(guard, "http://a.web.test/reset.png")
    assert fault.value.state == "connection"
    assert len(web.seen) == 1


def chunked(asked: Any) -> None:
    asked.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY))


def raw(head: bytes, data: bytes = BODY) -> Any:
    return lambda asked: asked.wfile.write(b"%s 200 OK\r\nContent-Length: %d\r\n" % (head, len(BODY)) + b"\r\n" + data)


@pytest.mark.parametrize(
    ("answer", "connections"),
    [
        (stay, 1),
        (chunked, 1),
        (lambda asked: stay(asked, Connection="close"), 3),
        (raw(b"HTTP/1.0"), 3),
        (raw(b"HTTP/1.1", BODY + EVIL), 3),
        (lambda asked: (chunked(asked), asked.wfile.write(b"evil")), 3),
    ],
)
def test_only_an_answer_with_nothing_behind_it_leaves_its_connection(web, guard, answer, connections):
    web.answers["/one.png"] = answer
    assert [body(guard, "http://a.web.test/one.png") for _ in range(3)] == [BODY] * 3
    assert web.connections == connections


def test_what_comes_late_behind_an_answer_is_no_answer_to_the_next(web, guard):
    read, written = threading.Event(), threading.Event()

    def late(asked: Any) -> None:
        stay(asked)
        asked.wfile.flush()
        assert read.wait(60)
        asked.wfile.write(EVIL)
        written.set()

    web.answers["/late.png"] = late
    body(guard, "http://a.web.test/late.png")
    read.set()
    assert written.wait(60)
    assert body(guard) == BODY
    assert web.connections == 2


@pytest.mark.parametrize(("behind", "connections"), [(b"", 1), (EVIL, 2)])
def test_what_is_behind_an_answer_in_its_tls_record_is_no_answer_to_the_next(
    web, tmp_path, monkeypatch, behind, connections
):
    certificate(tmp_path, "secure.web.test")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    web.socket = context.wrap_socket(web.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    length = 15_000  # with the head it fits one record, and not the 8 kB that are read at a time

    def answer(asked: Any) -> None:
        asked.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + b"x" * length + behind)

    web.answers["/one.png"] = answer
    with closing(Guard(user_agent="test/1", resolve={"*.web.test": f"127.0.0.1:{web.port}"})) as guard:
        for _ in range(2):
            assert body(guard, "https://secure.web.test/one.png") == b"x" * length
    assert web.connections == connections


def test_a_kept_connection_keeps_the_deadline(web, guard):
    body(guard)
    web.answers["/slow.png"] = lambda asked: trickle(asked, b"HTTP/1.1 200 OK\r\nX-Slow: ")
    began = time.monotonic()
    with pytest.raises(Fault) as fault:
        body(guard, "http://a.web.test/slow.png", seconds=0.3)
    assert fault.value.state == "timeout"
    assert time.monotonic() - began < 60  # all bytes would take minutes


def test_few_are_kept_and_none_behind_the_end(web):
    before = sockets()
    guard = Guard(user_agent="test/1", resolve={"*.web.test": f"127.0.0.1:{web.port}"})
    guard._connections = Connections(most=3)
    for host in "abcdef":
        body(guard, f"http://{host}.web.test/ok.png")
    assert len(guard._connections._kept) == 3
    guard.close()
    body(guard)
    assert not guard._connections._kept
    deadline = time.monotonic() + 5
    while sockets() > before and time.monotonic() < deadline:  # the server's side follows in its threads
        time.sleep(0.02)
    assert sockets() <= before


def test_what_was_idle_for_long_is_not_used(web, guard):
    guard._connections = Connections(idle_s=0.1)
    body(guard)
    time.sleep(0.15)
    assert body(guard) == BODY
    assert web.connections == 2
