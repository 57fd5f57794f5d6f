"""Ends its own process, as a crash would, where a decoder never comes back; the shard is then done again in isolation.

No thread can be called back from C. So a process that decodes watches what its own threads have in hand, and ends once
a picture has been with its decoder for too long. Done again (ray_shards.py, isolate.py), that costs the picture's row,
and here nothing but time. Whoever watches in Python needs the interpreter's lock, which a decoder may hold for ever: so
the watch only keeps putting off a timer of faulthandler's, which needs no lock. Where each thread was goes to standard
error, that is into the worker's log.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.download.images import Picture, PictureSpec, decode_slot, prepare_picture


class Watchdog:
    """`prepare_picture` for many threads, in a process that ends once a picture takes longer than `seconds`."""

    def __init__(self, spec: PictureSpec, seconds: float) -> None:
        self._spec, self._seconds = spec, seconds
        self._since: dict[int, float] = {}
        """Thread → when it came to its decoder."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Watchdog:
        self._said = os.dup(2)  # decoding sends the stream itself away meanwhile
        self._put_off()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        os.close(self._said)

    def prepare(self, body: bytes) -> Picture:
        """What `pictures.prepare_picture` makes of a body."""
        me = threading.get_ident()
        self._since[me] = time.monotonic()
        try:
            return prepare_picture(body, self._spec, self._slot)
        finally:
            del self._since[me]

    @contextmanager
    def _slot(self, width: int | None, height: int | None) -> Iterator[None]:
        """`images.decode_slot`; to wait for others to leave it is not to hang."""
        me = threading.get_ident()
        del self._since[me]
        try:
            with decode_slot(width, height):
                self._since[me] = time.monotonic()
                yield
        finally:
            self._since.setdefault(me, time.monotonic())

    def _look(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            now = time.monotonic()
            if now - min(tuple(self._since.values()), default=now) > self._seconds:
                faulthandler.dump_traceback(self._said)
                os._exit(1)
            self._put_off()

    def _put_off(self) -> None:
        """This process ends in so many seconds, unless this is called again meanwhile."""
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._said)
