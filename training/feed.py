"""Micro-batches prepared ahead: a thread reads and decodes what the order says comes next while the model trains."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch

from training.data import Batch, Data
from training.order import Order, derived

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
        self._thread = threading.Thread(target=self._fill, args=(threads,), name="feed", daemon=True)

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()

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
                    rows = self._order.rows(step, lane)
                    if not self._put(self._data.batch(rows, derived("noise", self._order.seed, step, lane))):
                        return
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits for the batch
            self._put(error)

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
