"""Where the rows lie that are trained on: the blocks of each shard, those of its rows that are wanted, their pictures.

Finding them reads no picture and no embedding, whatever the size of the data; a block is read once it is its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.concurrent import map_ordered
from infra.documents import digest
from infra.errors import Refused
from infra.records import UID, File, Manifest, Record, columns, object_name
from infra.store import Store
from training.data.labels import Labels, labelled

Wanted = Callable[[pa.Array], np.ndarray]
"""uids [n] → bool [n], which rows are wanted."""
THREADS = 8
"""Shards whose selections are read at a time: in S3 that is waiting."""


@dataclass(frozen=True)
class BlockRef:
    """Where the kept rows of a block are: rows `first + keep` of a Parquet file; tar and index hold the pictures."""

    parquet: File
    """The file that the block is a range of: rows.parquet of embed, or index.parquet of download."""
    first: int
    rows: int
    keep: np.ndarray
    """Kept rows, counted from `first`; int64 [k]."""
    names: str
    """SHA-256 of the uids of all rows of the block, as they were when their selection was looked up."""
    tar: str
    index: str

    def check(self, uids: pa.ChunkedArray) -> None:
        """Refused, code 5, where the block's uids, in order, are not those that the selection was made for."""
        if _names(uids.combine_chunks()) != self.names:
            raise Refused(
                f"rows {self.first} to {self.first + self.rows - 1} of the shard {self.parquet.sha256[:12]} are not "
                "those that its selection names",
                code=5,
            )


def block_refs(
    store: Store, rows: str, selection: str, labels: Labels | None = None, wanted: Wanted | None = None
) -> list[BlockRef]:
    """The blocks of all shards in the manifest's order, with the rows that the selection keeps and that are wanted and,
    where labels are asked for, that have one.

    rows and selection are versions of embed's and curate's manifests, or of download's and filter's. Refused, code 5,
    where the selection is of other data.
    """
    files = {name: file for record in Manifest.load(store, selection).records for name, file in record.files.items()}
    records = Manifest.load(store, rows).records
    return [
        place
        for shard in map_ordered(lambda record: list(_shard(store, record, files, labels, wanted)), records, THREADS)
        for place in shard
    ]


def _shard(
    store: Store, record: Record, selections: dict[str, File], labels: Labels | None, wanted: Wanted | None
) -> Iterator[BlockRef]:
    name = "rows.parquet" if "rows.parquet" in record.files else "index.parquet"
    parquet = record.files[name]
    sha = parquet.sha256
    if f"{sha}.parquet" not in selections:
        raise Refused(
            f"the selection says nothing of the shard {sha[:12]}: it is of another version of the data", code=5
        )
    selection = columns(store, selections[f"{sha}.parquet"], ["uid", "rule"])
    selected, stays = selection["uid"].combine_chunks(), pc.is_null(selection["rule"].combine_chunks())
    rows = sum(block.rows for block in record.blocks)
    if name == "rows.parquet" and len(selected) == rows:
        # The selection names every row, in order: the shard itself is not opened for that. `Place.check` makes sure.
        uids, mask = selected, stays.to_numpy(zero_copy_only=False)
    else:
        uids, kept = columns(store, parquet, ["uid"])["uid"].combine_chunks(), selected.filter(stays)
        mask = pc.is_in(uids, value_set=kept).to_numpy(zero_copy_only=False)
        if int(mask.sum()) != len(kept):
            raise Refused(
                f"the selection of the shard {sha[:12]} names {len(kept)} rows, of which it has {int(mask.sum())}",
                code=5,
            )
    tar = record.facts.get("tar") or (record.sha("images.tar") if "images.tar" in record.files else "")
    index = record.facts.get("index") or sha
    if labels is not None:
        having = labelled(store, index, labels.columns)
        mask = mask & pc.is_in(uids, value_set=having).to_numpy(zero_copy_only=False)
    if wanted is not None:
        mask = mask & wanted(uids)
    for block in record.blocks:
        keep = np.flatnonzero(mask[block.first : block.first + block.rows])
        yield BlockRef(parquet, block.first, block.rows, keep, _names(uids.slice(block.first, block.rows)), tar, index)


def _names(uids: pa.Array) -> str:
    width = UID.byte_width
    return digest(uids.buffers()[1].slice(uids.offset * width, len(uids) * width).to_pybytes())


@dataclass(frozen=True)
class Spans:
    """Encoded pictures that lie in a tar, each (offset, length): read one by one, out of the one range that has them
    all, of which a store that is elsewhere keeps a copy."""

    store: Store
    tar: str
    spans: Sequence[tuple[int, int]]

    @cached_property
    def range(self) -> tuple[int, int]:
        """(start, length) of the bytes from the first picture to the last."""
        first = min(offset for offset, _ in self.spans)
        return first, max(offset + length for offset, length in self.spans) - first

    def fetch(self) -> None:
        """Has the range here before its first picture is wanted."""
        first, _ = self.range
        self.store.part(object_name(self.tar), first, 0, within=self.range)

    def __getitem__(self, row: int) -> bytes:
        return self.store.part(object_name(self.tar), *self.spans[row], within=self.range)


class Index:
    """Where the pictures of a download's rows lie in its tar."""

    def __init__(self, store: Store, index: str) -> None:
        self._name = index
        path, names = store.local(object_name(index)), ["uid", "offset", "length"]
        self._rows = pq.read_table(path, columns=names, use_threads=False).combine_chunks()

    def spans(self, uids: Sequence[bytes]) -> list[tuple[int, int]]:
        """(offset, length) of each row's picture; Refused, code 5, where one has none."""
        rows = self._rows.take(pc.index_in(pa.array(uids, UID), value_set=self._rows["uid"]))
        found = list(zip(rows["offset"].to_pylist(), rows["length"].to_pylist(), strict=True))
        lost = next((uid for uid, (offset, _) in zip(uids, found, strict=True) if offset is None), None)
        if lost is not None:
            raise Refused(f"row {lost.hex()} has no picture in the index {self._name[:12]}", code=5)
        return found


def as_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of fixed-size float lists as float32 [rows, width]."""
    array = column.combine_chunks()
    return array.flatten().to_numpy().reshape(len(array), -1).astype(np.float32)
