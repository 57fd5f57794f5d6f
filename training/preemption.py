"""Signs that a worker should save at once: SIGTERM, or a node that is being drained.

Neither ends the run: a checkpoint is written after the step, and the fit goes on from there on other nodes, or with
fewer workers.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from infra.errors import Unavailable
from infra.store import Store

POLL_SECONDS = 2.0

_told = threading.Event()


def handle_sigterm() -> None:
    """From now on SIGTERM lets the loop save and end; the second one ends the process at once. Runs in the main thread
    of a worker's process, whose training runs in another."""

    def handle(number: int, frame: Any) -> None:
        signal.signal(number, lambda *_: os._exit(128 + number))
        _told.set()

    signal.signal(signal.SIGTERM, handle)


def sigterm_received() -> bool:
    """Whether this process was sent SIGTERM."""
    return _told.is_set()


class StopFlag:
    """Whether to save and stop: a stop was requested (a thread looks in the store every few seconds), or SIGTERM came.

    A store that does not answer holds nothing up, and says nothing: the request is found once it answers.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._asked = threading.Event()
        threading.Thread(target=self._watch, name="stop requests", daemon=True).start()

    def __call__(self) -> bool:
        return sigterm_received() or self._asked.is_set()

    def requested(self) -> bool:
        """Whether the driver asked for it, as far as the store says so."""
        with suppress(Unavailable):
            return self._asked.is_set() or self._store.exists(self._name)
        return False

    def _watch(self) -> None:
        while not self.requested():
            time.sleep(POLL_SECONDS)
        self._asked.set()


class Draining:
    """Whether to save since this node is about to be taken away: True once, as soon as the cluster says so.

    Ray's own `get_preemption_info` is a barrier of all workers and costs a process a fit; the ranks agree with each
    gradient anyway, so it is enough that the one concerned looks, every few seconds.
    """

    def __init__(self, nodes: Callable[[], dict[str, int]], node: str) -> None:
        self._nodes, self._node, self._looked, self._saved = nodes, node, time.monotonic(), False

    def __call__(self) -> bool:
        if self._saved or time.monotonic() - self._looked < POLL_SECONDS:
            return False
        self._looked = time.monotonic()
        self._saved = self._node in self._nodes()
        return self._saved
