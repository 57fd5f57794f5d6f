from __future__ import annotations

import http.client
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from pipelines.shapes import world
from pipelines.shapes.links import ASTRAY, HOSTS, Link, parse_path
from pipelines.shapes.server import Server, serve


@pytest.fixture
def server() -> Iterator[Server]:
    with serve(slow=0.25) as running:
        yield running


def first(fault: str | None, fits: Callable[[Link], bool] = lambda link: True) -> Link:
    links = (Link(0, 30, index) for index in range(10, 10_000))
    return next(link for link in links if link.fault == fault and fits(link))


def get(server: Server, path: str, host: str = HOSTS[0]) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request("GET", path, headers={"Host": host})
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def pixels(body: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))


def test_a_good_link_answers_with_its_picture(server: Server) -> None:
    link = first(None)
    answer, body = get(server, link.path, link.host)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "image/png")
    assert (pixels(body) == world.picture_of(link.index, 0)).all()


@pytest.mark.parametrize(("fault", "status"), [("missing", 404), ("gone", 410)])
def test_dead_links_stay_dead(server: Server, fault: str, status: int) -> None:
    assert [get(server, first(fault).path)[0].status for _ in range(3)] == [status] * 3


def test_a_reset_link_resets_the_connection(server: Server) -> None:
    for _ in range(2):
        with pytest.raises(ConnectionResetError, match="reset by peer"):
            get(server, first("reset").path)


def test_a_truncated_picture_breaks_off_or_cannot_be_decoded(server: Server) -> None:
    with pytest.raises(http.client.IncompleteRead):
        get(server, first("truncated", lambda link: link.variant < 0.5).path)
    answer, body = get(server, first("truncated", lambda link: link.variant >= 0.5).path)
    assert answer.status == 200
    with pytest.raises((OSError, SyntaxError, UnidentifiedImageError)):
        pixels(body)


def test_a_tiny_picture_is_8_by_8(server: Server) -> None:
    assert pixels(get(server, first("tiny").path)[1]).shape == (8, 8, 3)


def test_a_duplicate_has_the_very_bytes_of_another_link(server: Server) -> None:
    link = first("duplicate")
    assert link.shown != link
    assert get(server, link.path)[1] == get(server, link.shown.path)[1]


def test_a_mismatched_link_serves_a_good_picture_of_something_else(server: Server) -> None:
    link = first("mismatched")
    assert (pixels(get(server, link.path)[1]) == world.picture_of(link.index, 0)).all()
    assert world.parse(link.caption) != link.scene


def test_a_page_is_no_picture(server: Server) -> None:
    answer, body = get(server, first("page").path)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html")
    assert b"<!doctype html>" in body


def test_noai_is_said_in_a_header(server: Server) -> None:
    answer, body = get(server, first("noai").path)
    assert answer.headers["X-Robots-Tag"] == "noai"
    assert pixels(body).shape == (128, 128, 3)


def test_a_moved_link_leads_to_its_picture_on_another_host(server: Server) -> None:
    link = first("moved")
    answer, _ = get(server, link.path, link.host)
    host, _, path = answer.headers["Location"].removeprefix("http://").partition("/")
    assert answer.status == 301
    assert host in HOSTS
    assert host != link.host
    assert (pixels(get(server, f"/{path}", host)[1]) == world.picture_of(link.index, 0)).all()


@pytest.mark.parametrize("target", ASTRAY)
def test_some_redirects_lead_where_no_client_should_follow(server: Server, target: str) -> None:
    link = first("astray", lambda link: ASTRAY[int(link.variant * len(ASTRAY))] == target)
    answer, _ = get(server, link.path)
    assert (answer.status, answer.headers["Location"]) == (302, target)


def test_a_slow_link_answers_late_and_well(server: Server) -> None:
    start = time.monotonic()
    answer, _ = get(server, first("slow").path)
    assert answer.status == 200
    assert time.monotonic() - start >= 0.4 * server.slow


def test_a_flaky_link_fails_once_and_a_new_server_changes_no_final_outcome(server: Server) -> None:
    path = first("flaky").path
    assert [get(server, path)[0].status for _ in range(3)] == [503, 200, 200]
    with serve() as again:
        assert [get(again, path)[0].status for _ in range(2)] == [503, 200]
    assert server.attempts[path] == 3


def test_one_connection_serves_many_requests(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    sockets = set()
    for link in (first(None), first("missing"), first("page"), first(None)):
        connection.request("GET", link.path, headers={"Host": link.host})
        sockets.add(connection.sock)
        connection.getresponse().read()
    connection.close()
    assert len(sockets) == 1


def test_other_hosts_and_paths_are_not_served(server: Server) -> None:
    assert get(server, first(None).path, "example.org")[0].status == 421
    assert get(server, first(None).path, f"{HOSTS[1]}:80")[0].status == 200
    assert get(server, "/robots.txt")[0].status == 404


def test_a_server_of_one_seed_knows_no_other_world() -> None:
    with serve(seed=0) as server:
        assert get(server, Link(0, 30, 3, faulty=False).path)[0].status == 200
        assert get(server, Link(1, 30, 3, faulty=False).path)[0].status == 404


@contextmanager
def command(*options: str) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], int]]]:
    """The server as a process, and a function that asks it for a picture and returns the answer's status."""
    words = [sys.executable, "-m", "pipelines.shapes.server", "--port", "0", "--slow", "0.1", *options]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert tuple(ready["hosts"]) == HOSTS
        link = parse_path("/seed0-pairs30-clean/000001.png")
        assert link is not None

        def ask() -> int:
            connection = http.client.HTTPConnection("127.0.0.1", ready["port"], timeout=10)
            connection.request("GET", link.path, headers={"Host": link.host})
            return connection.getresponse().status

        yield process, ask


@pytest.mark.parametrize("end", ["line", "SIGTERM"])
def test_the_command_says_its_port_and_ends_when_told(end: str) -> None:
    with command("--linger", "60") as (process, ask):
        assert process.stdin is not None
        assert ask() == 200
        if end == "line":
            process.stdin.write(b"stop\n")
            process.stdin.flush()
        else:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0


@pytest.mark.slow
def test_the_command_outlives_whoever_started_it_for_a_while() -> None:
    with command("--linger", "2") as (process, ask):
        assert process.stdin is not None
        process.stdin.close()
        time.sleep(1)
        assert ask() == 200
        assert process.wait(timeout=10) == 0


def test_the_server_of_a_run_is_out_of_the_terminals_reach_and_ends_with_the_run() -> None:
    from pipelines.recipe.schema import World
    from pipelines.world import Server as OfRun

    with OfRun(World("pipelines.shapes", pictures=10)) as server:
        server.start()
        assert server.process is not None
        assert os.getsid(server.process.pid) != os.getsid(0)
        began = time.monotonic()
    assert server.process.returncode == 0
    assert time.monotonic() - began < 5
