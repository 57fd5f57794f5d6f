"""Finds digests that occurred before, over any number of rows: exact, by way of the disk.

Digests are dealt by their first byte into parts of a file, and equal ones are then found part by part. A few rows need
no disk. In memory is one byte a row, and one part: a 256th of the rows (24 bytes each, and as much again to sort them).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np

PARTS = 256
WAITING = 1 << 17
"""Rows that are held before they are dealt."""

Rows = np.ndarray
"""uint64 [rows, 3]: the two halves of a digest, and the row's place among all."""


def repeated(digests: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """For each uint64 [rows, 2], bool [rows]: which of these digests stand before them, there or in an earlier one."""
    sizes: list[int] = []
    with tempfile.TemporaryFile() as file:
        waiting: list[Rows] = []
        dealt: list[np.ndarray] = []
        place = held = 0
        for one in digests:
            rows = np.empty((len(one), 3), np.uint64)
            rows[:, :2], rows[:, 2] = one, np.arange(place, place + len(one), dtype=np.uint64)
            waiting.append(rows)
            sizes.append(len(one))
            place, held = place + len(one), held + len(one)
            if held >= WAITING:
                dealt.append(_deal(np.concatenate(waiting), place - held, file))
                waiting.clear()
                held = 0
        rejected = np.zeros(place, bool)
        if dealt and waiting:
            dealt.append(_deal(np.concatenate(waiting), place - held, file))
            waiting.clear()
        for rows in _parts(dealt, file) if dealt else waiting and [np.concatenate(waiting)]:
            rejected[_later(rows)] = True
    at = 0
    for size in sizes:
        yield rejected[at : at + size]
        at += size


def _deal(rows: Rows, start: int, file: IO[bytes]) -> np.ndarray:
    """Appends rows to a file that has `start` of them, part by part, each in the order of their places; int64 [PARTS +
    1]: where the parts begin and end, in rows."""
    part = (rows[:, 0] & np.uint64(PARTS - 1)).astype(np.uint8)
    file.write(rows.take(np.argsort(part, kind="stable"), 0).data)
    return start + np.cumsum([0, *np.bincount(part, minlength=PARTS)])


def _parts(dealt: list[np.ndarray], file: IO[bytes]) -> Iterator[Rows]:
    ends = np.array(dealt) * (3 * np.dtype(np.uint64).itemsize)
    for part in range(PARTS):
        read = list[bytes]()
        for start, end in ends[:, part : part + 2].tolist():
            file.seek(start)
            read.append(file.read(end - start))
        yield np.frombuffer(b"".join(read), np.uint64).reshape(-1, 3)


def _later(rows: Rows) -> np.ndarray:
    """Places of those whose digest an earlier one of these rows has; rows come in the order of their places."""
    bits = np.uint64(max(1, (len(rows) - 1).bit_length()))
    words = rows[:, 0] >> bits << bits | np.arange(len(rows), dtype=np.uint64)
    words.sort()  # plain numbers: a tenth of the time that whole digests take
    met = np.flatnonzero((words[1:] ^ words[:-1]) >> bits == 0)
    index = (np.uint64(1) << bits) - np.uint64(1)
    before, later = rows[words[met] & index], rows[words[met + 1] & index]
    if (before[:, :2] == later[:, :2]).all():
        return later[:, 2]
    # Digests that share many bits and differ, which happens on purpose alone.
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]  # stable
    return rows[1:, 2][(rows[1:, :2] == rows[:-1, :2]).all(1)]
