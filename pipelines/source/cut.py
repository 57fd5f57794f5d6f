"""Rows → slices: cuts a stream of rows where the rows themselves say so.

A slice is what one shard of every later data stage is made from. Cuts depend on the rows near them alone, so an
inserted, deleted or appended row changes the slice that it is in, and at most that slice's neighbours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import pyarrow as pa


def cut(uids: Iterable[bytes], rows_per_shard: int) -> Iterator[int]:
    """Sizes of successive slices, for uids in list order; all rows lie in one, and none is empty.

    A slice ends with a row whose uid is the smallest of the N/2 rows on either side of it (the first of equal ones).
    That is a matter of these rows alone, and two such rows are more than N/2 apart: so whatever happens to one row
    changes at most three successive slices. They have N rows on average. Where no such row comes for 4N rows, the
    smallest that leaves N/4 rows on either side ends the slice; on random uids that is rarer than one slice in 10⁵.
    """
    window, least, most = rows_per_shard // 2, max(1, rows_per_shard // 4), 4 * rows_per_shard
    smallest: deque[tuple[int, bytes]] = deque()  # candidates for the minimum of the last 2·window + 1 rows, rising
    piece: list[bytes] = []
    start = 0
    for here, name in enumerate(uids):
        piece.append(name)
        while smallest and smallest[-1][1] > name:
            smallest.pop()
        smallest.append((here, name))
        if smallest[0][0] < here - 2 * window:
            smallest.popleft()
        if here >= 2 * window and smallest[0][0] == here - window:
            size = here - window + 1 - start
        elif len(piece) == most + window:
            size = _forced(piece, least, most)
        else:
            continue
        yield size
        start += size
        del piece[:size]
    while len(piece) > most:
        size = _forced(piece, least, most)
        yield size
        del piece[:size]
    if piece:
        yield len(piece)


def _forced(piece: list[bytes], least: int, most: int) -> int:
    ends = range(least - 1, most - least)
    return min(ends, key=piece.__getitem__) + 1


def slices(batches: Iterable[pa.RecordBatch], rows_per_shard: int) -> Iterator[pa.Table]:
    """Cuts a stream of batches (with a column uid) into tables; holds little more than one slice at a time."""
    pending: deque[pa.RecordBatch] = deque()

    def uids() -> Iterator[bytes]:
        for batch in batches:
            if batch.num_rows:
                pending.append(batch)
                yield from batch.column("uid").to_pylist()

    for size in cut(uids(), rows_per_shard):
        taken = []
        while size:
            batch = pending.popleft()
            taken.append(batch.slice(0, size))
            if batch.num_rows > size:
                pending.appendleft(batch.slice(size))
            size -= taken[-1].num_rows
        yield pa.Table.from_batches(taken).combine_chunks()


def unique(table: pa.Table) -> pa.Table:
    """The first row of each uid, so that within a shard a uid names one row.

    Across shards `exact_duplicates` finds what is left: a slice must not depend on what other slices hold.
    """
    seen: set[bytes] = set()
    first = []
    for name in table["uid"].to_pylist():
        first.append(name not in seen)
        seen.add(name)
    return table if all(first) else table.filter(pa.array(first)).combine_chunks()
