"""A store whose calls are tried again: a restarting server or a full disk does not end weeks of work in memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from infra.errors import Unavailable
from infra.store.base import Entry, Store

T = TypeVar("T")
MOST_S = 15.0
"""Seconds between two attempts, at most."""

log = logging.getLogger(__name__)


class RetryingStore:
    """The same store; what meets `Unavailable` is tried again, with growing pauses, for up to `patience_s` seconds.

    Each call has that patience for itself. Where it ends, `Unavailable` is raised as it came.
    """

    def __init__(self, store: Store, patience_s: float) -> None:
        self._store, self._patience_s = store, patience_s
        self._waiting: set[int] = set()
        """Threads that wait just now, and have said so."""

    @property
    def uri(self) -> str:
        return self._store.uri

    @property
    def distant(self) -> bool:
        return self._store.distant

    def with_retries(self, call: Callable[[], T]) -> T:
        """What `call` returns, once it meets no `Unavailable`; it may be called many times."""
        again = Retrying(
            retry=retry_if_exception_type(Unavailable),
            stop=stop_after_delay(self._patience_s),
            wait=wait_random_exponential(multiplier=0.5, max=MOST_S),
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            return again(call)
        finally:
            self._waiting.discard(threading.get_ident())

    def _tell(self, state: RetryCallState) -> None:
        if threading.get_ident() not in self._waiting and state.outcome is not None:
            self._waiting.add(threading.get_ident())
            log.warning("%s It is waited for, up to %.0f s.", state.outcome.exception(), self._patience_s)

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        return self.with_retries(lambda: self._store.get(name, start, length))

    def part(self, name: str, start: int, length: int, within: tuple[int, int] | None = None) -> bytes:
        return self.with_retries(lambda: self._store.part(name, start, length, within))

    def put_new(self, name: str, data: bytes | Path) -> bool:
        return self.with_retries(lambda: self._store.put_new(name, data))

    def list(self, prefix: str) -> Iterator[Entry]:
        yield from self.with_retries(lambda: [*self._store.list(prefix)])

    def local(self, name: str) -> Path:
        return self.with_retries(lambda: self._store.local(name))

    def exists(self, name: str) -> bool:
        return self.with_retries(lambda: self._store.exists(name))

    def delete(self, name: str) -> None:
        self.with_retries(lambda: self._store.delete(name))

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        with ExitStack() as stack:
            yield self.with_retries(lambda: stack.enter_context(self._store.scratch()))


def with_retries(store: Store, call: Callable[[], T]) -> T:
    """What `call`, which writes files for that store, returns: with the store's patience, where it has some."""
    return store.with_retries(call) if isinstance(store, RetryingStore) else call()
