"""Micro-batches prepared ahead: a thread reads and decodes what the order says comes next while the model trains.

From a store that is elsewhere, others bring the blocks of each lane's next window meanwhile: a window begins with rows
of all its blocks.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch

from training.data.batches import Batch, Data
from training.data.order import Order, derive_seed

FETCHERS = 8
"""Blocks that are brought from elsewhere at a time."""

log = logging.getLogger(__name__)


class Feed:
    """Micro-batches of some lanes, prepared ahead by a thread: `with Feed(...) as feed: feed.next()`.

    They come in the order (step, lane of `lanes`) from `first_step` on; the seed of each is (seed, step, lane)'s.
    """

    def __init__(
        self, data: Data, order: Order, lanes: Sequence[int], first_step: int, steps: int, ahead: int, threads: int
    ):
        self._data, self._order, self._lanes = data, order, lanes
        self._steps = range(first_step, steps)
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._windows: dict[int, int] = {}
        """Lane → the window up to which its blocks are being brought."""
        self._blocks: queue.SimpleQueue[int] = queue.SimpleQueue()
        count = FETCHERS if data.store.distant else 0
        self._fetchers = [threading.Thread(target=self._fetch, name="fetch", daemon=True) for _ in range(count)]
        self._thread = threading.Thread(target=self._fill, args=(threads,), name="feed", daemon=True)

    def __enter__(self) -> Feed:
        for thread in (self._thread, *self._fetchers):
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()
        for _ in self._fetchers:  # which end by themselves: a store may be long in answering
            self._blocks.put(-1)

    def next(self) -> Batch:
        """The next micro-batch; whatever went wrong while preparing it is raised here."""
        made = self._queue.get()
        if isinstance(made, BaseException):
            raise made
        return made

    def _fill(self, threads: int) -> None:
        torch.set_num_threads(threads)  # the number is a thread's own, and sums depend on it
        try:
            for step in self._steps:
                if step == self._steps.start + 1:
                    self._complain()
                for lane in self._lanes:
                    self._bring(step, lane)
                    rows = self._order.rows(step, lane)
                    if not self._put(self._data.batch(rows, derive_seed("noise", self._order.seed, step, lane))):
                        return
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits for the batch
            self._put(error)

    def _bring(self, step: int, lane: int) -> None:
        """Lets the blocks of this window and of the next be brought, unless they are."""
        if not self._fetchers:
            return
        here = self._order.window_of(step, lane)
        for number in range(self._windows.get(lane, here - 1) + 1, here + 2):
            for block in self._order.blocks_of(lane, number):
                self._blocks.put(block)
        self._windows[lane] = here + 1

    def _fetch(self) -> None:
        while (block := self._blocks.get()) >= 0 and not self._closed.is_set():
            with suppress(Exception):  # what fails here fails again, and is told, where the block is read
                self._data.fetch(block)

    def _complain(self) -> None:
        """Says so where the rows that are mixed have no room in memory, so that blocks are read again and again."""
        rows = min(self._order.mixed * len(self._lanes), sum(self._data.counts))
        if (wanted := self._data.row_bytes * rows) > self._data.limit:
            log.warning(
                "%d rows are mixed here, which take about %d MB, and cache_bytes is %d MB: most blocks are read many "
                "times an epoch. Raise cache_bytes, take more workers, or lower train.window.",
                rows,
                wanted / 1e6,
                self._data.limit / 1e6,
            )

    def _put(self, made: Batch | BaseException) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(made, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
