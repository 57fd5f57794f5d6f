"""Which URL of a shard is fetched next, so that every host gets its share and none holds up the rest.

Hosts take turns, and no host has more than so many requests at a time. What may pass is asked again after a random,
growing wait, and as late as the host says (Retry-After); no thread sleeps meanwhile. A host that lets an attempt time
out is a suspect until it answers: it is asked one URL at a time, beside the others, and given up after so many such
attempts in a row. So a host that hangs costs a few waits in all, not one a URL, and a bad moment costs no row.
"""

from __future__ import annotations

import heapq
import itertools
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from urllib.parse import urlsplit

from infra.errors import Refused
from pipelines.download.guard import Fault
from unclip.config import AMOUNT, COUNT, WHOLE, Range, outside

LONGEST_S = 30.0
"""The longest wait of our own before another attempt."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class FetchPolicy:
    """How the servers of a shard are treated. None of it changes the bytes of a row that succeeds."""

    threads: int = 16
    """Fetches at a time, a task."""
    per_host: int = 4
    """Fetches at a time from one host, a task; 1 until it has answered."""
    retries: int = 2
    """Further attempts after a failure that may pass: timeouts, resets, cut bodies, 429, 5xx."""
    backoff_s: float = 0.5
    """The wait before the next attempt is random, up to this many seconds, doubling each time (at most 30)."""
    retry_after_s: float = 60.0
    """Seconds in all that a host may make a shard wait for it by Retry-After. Where it asks for more, the row ends in
    its state, and that counts as a timeout does for `give_up`, but as `host_busy`."""
    give_up: int = 3
    """After so many attempts in a row, one behind the other, that timed out, a host's other rows of the shard are not
    asked: those that never were end as `host_timeout`. 0: every row is asked."""

    def __post_init__(self) -> None:
        ranges = {"threads": COUNT, "per_host": COUNT, "retries": Range(0, 100), "give_up": WHOLE}
        if wrong := outside(self, **ranges, backoff_s=AMOUNT, retry_after_s=AMOUNT):
            raise Refused(f"download.{wrong}")


@dataclass(eq=False)
class _Row:
    position: int
    url: str
    host: _Host
    attempts: int = 0
    began: float = 0.0
    suspect: bool = False
    """Whether the host was a suspect when this attempt began."""
    fault: Fault | None = None
    """Of the last attempt."""


@dataclass(eq=False)
class _Host:
    rows: deque[_Row] = field(default_factory=deque)
    """To be asked when it is their turn, in list order; those that come back from a wait go first."""
    waiting: set[_Row] = field(default_factory=set)
    """To be asked again later."""
    flying: int = 0
    queued: bool = False
    answered: bool = False
    strikes: int = 0
    """Attempts in a row that timed out, or were told to come back too late. Any: it is a suspect."""
    struck: float = 0.0
    """When the last strike was; attempts that began before it say nothing new."""
    granted: float = 0.0
    """Seconds of rest that it was given so far."""
    rest_until: float = 0.0
    given_up: bool = False


class FetchScheduler(Generic[Result]):
    """The rows of a shard and what became of them, shared by the threads that fetch and the one that reads.

    urls: (position, URL). At most 2 × `threads` rows are under way or unread at a time.
    """

    def __init__(self, urls: Iterable[tuple[int, str]], manners: FetchPolicy) -> None:
        self._manners = manners
        hosts: dict[str, _Host] = {}
        for position, url in urls:
            host = hosts.setdefault(_host(url), _Host())
            host.rows.append(_Row(position, url, host))
        lock = threading.Lock()
        self._turn, self._news = threading.Condition(lock), threading.Condition(lock)
        self._ring, self._suspects = deque[_Host](), deque[_Host]()
        self._later: list[tuple[float, int, _Host, _Row | None]] = []
        self._count = itertools.count()
        self._left = sum(len(host.rows) for host in hosts.values())
        self._flying = self._suspected = 0
        self._results = deque[tuple[int, Result | Fault]]()
        self._error: BaseException | None = None
        self._closed = False
        for host in hosts.values():
            self._queue(host, 0.0)

    def take(self) -> _Row | None:
        """The row whose turn it is, once there is one; None when all are done."""
        with self._turn:
            while self._left and not self._closed:
                now = time.monotonic()
                self._wake(now)
                if self._flying + len(self._results) < 2 * self._manners.threads and (row := self._next(now)):
                    if self._ring or self._suspects:
                        self._turn.notify()
                    return row
                self._turn.wait(max(0.0, self._later[0][0] - now) if self._later else None)
            return None

    def report(self, row: _Row, got: Result | Fault) -> None:
        """Says what an attempt gave; the row is done, or will be asked again."""
        with self._turn:
            now, host = time.monotonic(), row.host
            host.flying -= 1
            self._flying -= 1
            self._suspected -= row.suspect
            again = self._judge(row, got, now)
            if isinstance(got, Fault) and again and not host.given_up:
                row.fault = got
                host.waiting.add(row)
                wait = random.uniform(0, min(LONGEST_S, self._manners.backoff_s * 2 ** (row.attempts - 1)))
                self._put_off(max(now + wait, host.rest_until), host, row)
            else:
                self._finish(row, got)
            self._queue(host, now)
            self._turn.notify()

    def results(self) -> Iterator[tuple[int, Result | Fault]]:
        """(position, what was fetched or why not) of every row, as they are done."""
        while True:
            with self._news:
                while self._left and not self._results and self._error is None:
                    self._news.wait()
                if self._error is not None:
                    raise self._error
                if not self._results:
                    return
                one = self._results.popleft()
                self._turn.notify()
            yield one

    def close(self, error: BaseException | None = None) -> None:
        """Hands out no more rows; `results` raises the error."""
        with self._turn:
            self._closed, self._error = True, self._error or error
            self._turn.notify_all()
            self._news.notify_all()

    def _next(self, now: float) -> _Row | None:
        # Suspects may hold a quarter of the threads, so that they are through before the others are; all that are idle.
        lines = [self._ring, self._suspects]
        if self._suspected < self._manners.threads // 4:
            lines.reverse()
        for line in lines:
            while line:
                host = line.popleft()
                host.queued = False
                if not self._may(host, now) or (line is self._suspects) != bool(host.strikes):
                    self._queue(host, now)  # things have changed since it stood in line
                    continue
                row = host.rows.popleft()
                row.attempts, row.began, row.suspect = row.attempts + 1, now, bool(host.strikes)
                host.flying += 1
                self._flying += 1
                self._suspected += row.suspect
                self._queue(host, now)
                return row
        return None

    def _may(self, host: _Host, now: float) -> bool:
        """Whether a host can be asked one more URL now."""
        most = self._manners.per_host if host.answered and not host.strikes else 1
        return bool(host.rows) and host.flying < most and host.rest_until <= now

    def _queue(self, host: _Host, now: float) -> None:
        if not host.queued and self._may(host, now):
            host.queued = True
            (self._suspects if host.strikes else self._ring).append(host)

    def _judge(self, row: _Row, got: Result | Fault, now: float) -> bool:
        """What an attempt says about its host; returns whether the row may be asked again."""
        host, manners = row.host, self._manners
        if not isinstance(got, Fault):
            host.answered, host.strikes = True, 0
            return False
        host.answered = host.answered or got.answered
        late = not self._rest(host, got.retry_after, now)
        if not late and got.state != "timeout":
            host.strikes = 0
        elif row.began >= host.struck:
            host.strikes, host.struck = host.strikes + 1, now
            if host.strikes == manners.give_up:
                self._give_up(host, "host_busy" if late else "host_timeout")
        return got.transient and not late and row.attempts <= manners.retries

    def _rest(self, host: _Host, seconds: float | None, now: float) -> bool:
        """Lets a host rest for as long as it asked; False if that is more than it is granted."""
        until = now + (seconds or 0.0)
        more = until - max(now, host.rest_until)
        if more > 0:
            if host.granted + more > self._manners.retry_after_s:
                return False
            host.granted, host.rest_until = host.granted + more, until
            self._put_off(until, host, None)
        return True

    def _put_off(self, when: float, host: _Host, row: _Row | None) -> None:
        heapq.heappush(self._later, (when, next(self._count), host, row))

    def _wake(self, now: float) -> None:
        while self._later and self._later[0][0] <= now:
            _, _, host, row = heapq.heappop(self._later)
            if row in host.waiting:
                host.waiting.remove(row)
                host.rows.appendleft(row)
            self._queue(host, now)

    def _give_up(self, host: _Host, state: str) -> None:
        host.given_up = True
        for row in (*host.waiting, *host.rows):
            self._finish(row, row.fault or Fault(state, f"its host failed {host.strikes} times in a row"))
        host.waiting.clear()
        host.rows.clear()
        self._turn.notify_all()

    def _finish(self, row: _Row, got: Result | Fault) -> None:
        self._results.append((row.position, got))
        self._left -= 1
        self._news.notify()
        if not self._left:
            self._turn.notify_all()


def fetch_all(
    urls: Iterable[tuple[int, str]], fetch: Callable[[str], Result], manners: FetchPolicy
) -> Iterator[tuple[int, Result | Fault]]:
    """(position, what `fetch` gave or the Fault it raised) of each URL, in the order in which they are done.

    Whatever else `fetch` raises is raised here, once the attempts under way have ended.
    """
    turns = FetchScheduler[Result](urls, manners)

    def work() -> None:
        try:
            while row := turns.take():
                try:
                    got: Result | Fault = fetch(row.url)
                except Fault as fault:
                    got = fault
                turns.report(row, got)
        except BaseException as error:
            turns.close(error)
            raise

    with ThreadPoolExecutor(manners.threads, thread_name_prefix="fetch") as pool:
        for _ in range(manners.threads):
            pool.submit(work)
        try:
            yield from turns.results()
        finally:
            turns.close()


def _host(url: str) -> str:
    """The host that a URL names; "" where it names none, which its fetch will say."""
    try:
        return (urlsplit(url.strip()).hostname or "").rstrip(".")
    except ValueError:
        return ""
