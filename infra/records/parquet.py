"""Some columns or rows of a stored Parquet file: of a large one, only the bytes in which they lie are fetched."""

from __future__ import annotations

import io
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import NotFound
from infra.records.damage import explain_damage
from infra.records.manifest import File
from infra.records.objects import object_name
from infra.store import Store

SMALL = 4 << 20
"""Bytes of a file that is fetched whole, with one request."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def columns(store: Store, file: File, names: Sequence[str]) -> pa.Table:
    """These columns of a Parquet object, those that it has; Refused, code 5, where it is missing or damaged."""
    name = object_name(file.sha256)
    with explain_damage(name):
        small = file.bytes <= SMALL
        source = pa.BufferReader(store.get(name)) if small else pa.PythonFile(Ranged(store.get, name, file.bytes))
        with pq.ParquetFile(source, pre_buffer=True) as opened:
            return opened.read([one for one in names if one in opened.schema_arrow.names])


def stored_file(store: Store, sha256: str) -> File:
    """The object of that SHA-256, with its size; Refused, code 5, where it is missing."""
    name = object_name(sha256)
    with explain_damage(name):
        found = next((entry for entry in store.list(name) if entry.name == name), None)
        if found is None:
            raise NotFound(name, store.uri)
    return File(sha256, found.bytes)


class RowGroups:
    """Rows of one Parquet object, in the ranges of the file in which they lie: what a trainer reads again each epoch.

    Ranges are kept on this machine where the store is elsewhere (`Store.part`).
    """

    def __init__(self, store: Store, file: File) -> None:
        self._store, self._name, self._bytes = store, object_name(file.sha256), file.bytes
        with explain_damage(self._name):
            self._metadata = pq.read_metadata(self._open())
        counts = [self._metadata.row_group(group).num_rows for group in range(self._metadata.num_row_groups)]
        self._starts = [0, *accumulate(counts)]

    def read(self, first: int, rows: int, names: Sequence[str]) -> pa.Table:
        """Those columns of rows [first, first + rows), at least one, out of the row groups that hold them."""
        groups = range(bisect_right(self._starts, first) - 1, bisect_left(self._starts, first + rows))
        with (
            explain_damage(self._name),
            pq.ParquetFile(self._open(), metadata=self._metadata, pre_buffer=True) as opened,
        ):
            table = opened.read_row_groups(list(groups), columns=list(names), use_threads=False)
        return table.slice(first - self._starts[groups[0]], rows)

    def _open(self) -> pa.PythonFile:
        return pa.PythonFile(Ranged(self._store.part, self._name, self._bytes))


class Ranged(io.RawIOBase):
    """A stored file of so many bytes to be read at any place; each read is one call of `get` (name, start, length)."""

    def __init__(self, get: Callable[[str, int, int], bytes], name: str, length: int) -> None:
        self._get, self._name, self._length, self._at = get, name, length, 0

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
        data = self._get(self._name, self._at, wanted) if wanted else b""
        self._at += len(data)
        return data
