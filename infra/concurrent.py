"""Bounded maps over threads: few items are under way or unread at a time, however many there are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_unordered(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[tuple[int, Result]]:
    """(position, result) of each item as it is done; at most twice `threads` are under way or unread at a time."""
    flying: dict[Future[Result], int] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool:
        try:
            for position, item in enumerate(items):
                flying[pool.submit(work, item)] = position
                while len(flying) >= 2 * threads:
                    yield from _take(flying)
            while flying:
                yield from _take(flying)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def map_ordered(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """The result of each item, in their order; at most twice `threads` are under way or unread at a time."""
    flying: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        try:
            for item in items:
                flying.append(pool.submit(work, item))
                if len(flying) >= 2 * threads:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _take(flying: dict[Future[Result], int]) -> Iterator[tuple[int, Result]]:
    done, _ = wait(flying, return_when=FIRST_COMPLETED)
    for future in done:
        yield flying.pop(future), future.result()
