"""In which order a shard's URLs are asked, and what becomes of hosts that hang or ask for patience."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from email.message import Message
from email.utils import format_datetime, localtime
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.download.guard import Fault, retry_after
from pipelines.download.schedule import FetchPolicy, fetch_all

QUICK = {"backoff_s": 0.005, "retries": 2}


def urls(**hosts: int) -> list[str]:
    """So many URLs of each host, host behind host."""
    return [f"http://{host}/{number}" for host, count in hosts.items() for number in range(count)]


def states(wanted: list[str], fetch: Callable[[str], str], manners: FetchPolicy) -> list[str]:
    """What became of each URL, in list order; each exactly once."""
    seen: dict[int, str] = {}
    for position, got in fetch_all(enumerate(wanted), fetch, manners):
        assert position not in seen
        seen[position] = got.state if isinstance(got, Fault) else got
    assert sorted(seen) == list(range(len(wanted)))
    return [seen[position] for position in range(len(wanted))]


def host(url: str) -> str:
    return str(urlsplit(url).hostname)


def test_hosts_take_turns_in_list_order():
    asked: list[str] = []
    states(urls(a=4, b=2, c=1), lambda url: asked.append(url[7:]) or "", FetchPolicy(threads=1))
    assert asked == ["a/0", "b/0", "c/0", "a/1", "b/1", "a/2", "a/3"]


def test_no_host_has_more_requests_than_it_may_have():
    flying, most, lock = Counter[str](), Counter[str](), threading.Lock()

    def fetch(url: str) -> str:
        with lock:
            flying[host(url)] += 1
            most[host(url)] = max(most[host(url)], flying[host(url)])
        time.sleep(0.005)
        with lock:
            flying[host(url)] -= 1
        return "got"

    assert states(urls(a=40, b=5), fetch, FetchPolicy(threads=12, per_host=3)) == ["got"] * 45
    assert most["a"] == 3
    assert most["b"] <= 3


def test_a_host_that_hangs_costs_a_few_waits_and_no_row_of_another():
    asked = Counter[str]()

    def fetch(url: str) -> str:
        asked[host(url)] += 1
        if host(url) == "mute":
            time.sleep(0.1)
            raise Fault("timeout", transient=True)
        time.sleep(0.002)
        return "got"

    wanted = urls(mute=200, a=100, b=100)
    got = states(wanted, fetch, FetchPolicy(threads=4, give_up=3, **QUICK))
    assert got[200:] == ["got"] * 200
    assert set(got[:200]) == {"timeout", "host_timeout"}
    assert asked["mute"] == 3  # waits, of the 600 that three attempts at each row are; one row may have had two


def test_every_row_is_asked_where_no_host_is_given_up():
    def fetch(url: str) -> str:
        raise Fault("timeout", transient=True)

    assert states(urls(a=12), fetch, FetchPolicy(threads=4, give_up=0, **QUICK)) == ["timeout"] * 12


def test_a_bad_moment_costs_no_row():
    began = time.monotonic()

    def fetch(url: str) -> str:
        if time.monotonic() - began < 0.2:  # all that are under way time out together: one strike, not four
            time.sleep(0.2)
            raise Fault("timeout", transient=True)
        return "got"

    assert states(urls(a=50), fetch, FetchPolicy(threads=8, give_up=2, **QUICK)) == ["got"] * 50


def test_what_may_pass_is_asked_again_so_often_and_what_may_not_is_not():
    asked = Counter[str]()

    def fetch(url: str) -> str:
        asked[url] += 1
        raise Fault("http_503" if host(url) == "a" else "http_404", transient=host(url) == "a")

    assert set(states(urls(a=5, b=5), fetch, FetchPolicy(retries=3, backoff_s=0.001))) == {"http_503", "http_404"}
    assert set(asked.values()) == {4, 1}


def test_a_host_that_asks_for_patience_is_left_alone_for_so_long():
    asked: list[float] = []

    def fetch(url: str) -> str:
        asked.append(time.monotonic())
        if len(asked) == 1:
            raise Fault("http_429", transient=True, retry_after=0.3)
        return "got"

    assert states(urls(a=5), fetch, FetchPolicy(threads=4, **QUICK)) == ["got"] * 5
    assert asked[1] - asked[0] >= 0.3


def test_a_host_that_asks_for_too_much_patience_is_given_up():
    def fetch(url: str) -> str:
        raise Fault("http_429", transient=True, retry_after=3600)

    began = time.monotonic()
    got = states(urls(a=10), fetch, FetchPolicy(give_up=2, retry_after_s=1.0, **QUICK))
    assert Counter(got) == {"http_429": 2, "host_busy": 8}
    assert time.monotonic() - began < 600  # and not the hour


def test_what_else_goes_wrong_is_raised_and_ends_it():
    def fetch(url: str) -> str:
        if url.endswith("/7"):
            raise RuntimeError("a defect")
        return "got"

    with pytest.raises(RuntimeError, match="a defect"):
        states(urls(a=1000), fetch, FetchPolicy(threads=4))


def test_few_results_wait_to_be_read():
    asked: list[str] = []
    for read, _ in enumerate(
        fetch_all(enumerate(urls(a=60, b=60)), lambda url: asked.append(url), FetchPolicy(threads=4)), 1
    ):
        assert len(asked) - read < 8


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcde"), st.integers(0, 4), st.sampled_from(["", "timeout", "http_503", "gone"]))
    ),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_every_row_ends_in_exactly_one_state(rows, threads, per_host, give_up):
    attempts = Counter[str]()

    def fetch(url: str) -> str:
        _, fails, state = rows[int(url.rpartition("/")[2])]
        attempts[url] += 1
        if state and attempts[url] <= fails:
            raise Fault(state, transient=state != "gone", retry_after=0.001 if state == "http_503" else None)
        return "got"

    wanted = [f"http://{name}/{number}" for number, (name, _, _) in enumerate(rows)]
    manners = FetchPolicy(threads, per_host, retries=2, backoff_s=0.001, give_up=give_up)
    for (_, fails, state), got in zip(rows, states(wanted, fetch, manners), strict=True):
        patient = not state or not fails or (state != "gone" and fails <= manners.retries)
        assert got in ({"got", "timeout", "host_timeout", "http_503"} if give_up else {"got"}) if patient else True
        assert got in {"got", state, "host_timeout"}
    assert all(count <= 3 for count in attempts.values())


@pytest.mark.parametrize(
    ("said", "low", "high"),
    [("120", 120, 120), (" 0 ", 0, 0), (format_datetime(localtime()), 0, 1), ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0)],
    ids=["seconds", "spaces", "now", "long ago"],
)
def test_retry_after_is_read_as_seconds_or_date(said, low, high):
    headers = Message()
    headers["Retry-After"] = said
    got = retry_after(headers)
    assert got is not None
    assert low <= got <= high


@pytest.mark.parametrize("said", ["soon", "-1", "1e9", "٣", "", "Wed, 99 Foo 2015"])
def test_what_retry_after_does_not_say_is_not_guessed(said):
    headers = Message()
    headers["Retry-After"] = said
    assert retry_after(headers) is None
