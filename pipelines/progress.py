"""How far a shard is, told by whoever goes through its rows to whoever watches: rows by state, about once a second.

A stage's `run` knows nothing of Ray or a monitor; it says what became
of a row, and that goes where `reporting_to` leads it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

OFTEN_S = 1.0
"""A shard tells at most this often how far it is."""

Told = Callable[[Mapping[str, int], int], None]
"""Hears the rows of a shard so far by state, and how many it has in all."""


@dataclass
class _Shard:
    told: Told
    rows: int = 0
    states: Counter[str] = field(default_factory=Counter)
    last: float = field(default_factory=time.monotonic)

    def tell(self) -> None:
        now = time.monotonic()
        if now - self.last >= OFTEN_S:
            self.last = now
            self.told(self.states, self.rows)


_here: ContextVar[_Shard | None] = ContextVar("shard", default=None)


@contextmanager
def reporting_to(told: Told) -> Iterator[None]:
    """In this context, what `expect_rows` and `count_row` say goes to `told`."""
    token = _here.set(_Shard(told))
    try:
        yield
    finally:
        _here.reset(token)


def expect_rows(rows: int) -> None:
    """The shard has so many rows."""
    if shard := _here.get():
        shard.rows = rows


def count_row(state: str) -> None:
    """One more row ended in this state."""
    if shard := _here.get():
        shard.states[state] += 1
        shard.tell()


def count_rows(states: Mapping[str, int]) -> None:
    """So many rows ended in these states by now, in all."""
    if shard := _here.get():
        shard.states = Counter(states)
        shard.tell()
