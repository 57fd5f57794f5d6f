"""Some columns of a stored Parquet file: of a large one, only the bytes in which these columns lie are fetched."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from infra.damage import reading
from infra.manifest import File, object_name
from infra.store import Store

SMALL = 4 << 20
"""Bytes of a file that is fetched whole, with one request."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def columns(store: Store, file: File, names: Sequence[str]) -> pa.Table:
    """These columns of a Parquet object, those that it has; Refused, code 5, where it is missing or damaged."""
    name = object_name(file.sha256)
    with reading(name):
        source = (
            pa.BufferReader(store.get(name)) if file.bytes <= SMALL else pa.PythonFile(Ranged(store, name, file.bytes))
        )
        with pq.ParquetFile(source, pre_buffer=True) as opened:
            return opened.read([one for one in names if one in opened.schema_arrow.names])


class Ranged(io.RawIOBase):
    """A stored file of so many bytes to be read at any place; each read is a request."""

    def __init__(self, store: Store, name: str, length: int) -> None:
        self._store, self._name, self._length, self._at = store, name, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence] + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        wanted = left if size is None or size < 0 else min(size, left)
        data = self._store.get(self._name, self._at, wanted) if wanted else b""
        self._at += len(data)
        return data


def ahead(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """What `work` gives for each item, in order; at most twice `threads` items are under way or unread at a time."""
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
