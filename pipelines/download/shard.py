"""Rows and what became of them → a shard: a webdataset tar and an index in which every row has its state.

Tars are in list order with times and owners of zero: the same rows give the same bytes, in whatever order they came.
What was forgotten (infra/records/forgotten.py) is neither asked for nor kept.
"""

from __future__ import annotations

import io
import itertools
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from infra.documents import canonical
from infra.records import FORGOTTEN, INDEX, KEPT, SOURCE, Action, Block, Forgotten, Manifest, Record, object_name
from infra.store import Store
from pipelines.download.images import Picture, PictureSpec, resizer
from pipelines.download.redact import redact_tar
from pipelines.progress import count_row, expect_rows
from pipelines.stage import StageBase, plain

TAR, TABLE = "images.tar", "index.parquet"
BLOCK_ROWS = 256
_HEADER = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)

Members = list[tuple[str, bytes]]
"""What the tar holds of a row: names and bytes of picture, caption and facts."""


@dataclass(frozen=True)
class Packing(StageBase):
    """What `Download` and `Gather` share as stages: each slice → `images.tar` and `index.parquet`, under one name.

    Blocks are ranges of the index.
    """

    spec: PictureSpec
    how: Any
    name = group = "download"
    needs = ("source",)
    kind = "task"
    maps = "source"
    role = "rows"
    step = "downloaded"

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        (source,) = inputs
        spec = plain(self.spec)
        for name in source.only.facts["slices"]:
            yield self.action(spec, (source.only.sha(name),))

    def setup(self) -> None:
        """Imports what the first picture would otherwise wait for."""
        resizer(self.spec)


@dataclass(frozen=True)
class Outcome:
    """A row's final state here; SHA-256 of what was fetched and the picture as far as it got."""

    state: str
    sha256: bytes | None = None
    picture: Picture | None = None


@dataclass(frozen=True)
class Earlier:
    """A shard that is there already, to be gone over again: its index, a line a row, and its tar."""

    index: list[dict[str, Any]]
    tar: Path
    generation: int

    @classmethod
    def read(cls, store: Store, record: Record) -> Earlier:
        """The shard of a record."""
        index = pq.read_table(store.local(object_name(record.sha(TABLE)))).select(INDEX.names)
        return cls(index.to_pylist(), store.local(object_name(record.sha(TAR))), record.generation)

    def lines(self, *, without: Container[str]) -> dict[int, dict[str, Any]]:
        """Position → line of the index, of the rows that are not in these states."""
        return {position: line for position, line in enumerate(self.index) if line["state"] not in without}

    def samples(self) -> Iterator[Members]:
        """(name, bytes) of the three members of each kept row, in list order."""
        with tarfile.open(self.tar) as tar:
            members = iter(tar)
            while sample := list(itertools.islice(members, 3)):
                yield [(one.name, tar.extractfile(one).read()) for one in sample]  # type: ignore[union-attr]


class ShardWriter:
    """Writes a shard into a folder, rows in list order however they come; a context.

    table: the slice (uid, url, caption, columns to be kept). settled: position → line of the index, of the rows that
    are not fetched. samples: what the tar holds of those among them that are kept, in list order. A picture that comes
    before its turn waits in a file without a name, so memory does not grow with the shard.
    """

    def __init__(
        self,
        table: pa.Table,
        out: Path,
        extension: str,
        settled: Mapping[int, Mapping[str, Any]],
        samples: Iterator[Members],
    ) -> None:
        self._table, self._out, self._extension = table, out, extension
        self._rows: list[dict[str, Any]] = table.select(SOURCE.names).to_pylist()
        self._settled, self._samples = settled, samples
        self._index: list[dict[str, Any]] = []
        self._early: dict[int, tuple[Outcome, int, int]] = {}  # without the data; where in the spool, how many bytes

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            self._spool = opened.enter_context(tempfile.TemporaryFile(dir=self._out))
            self._tar = opened.enter_context(tarfile.open(self._out / TAR, "w", format=tarfile.USTAR_FORMAT))
            self._opened = opened.pop_all()
        self._go_on()
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def add(self, position: int, got: Outcome) -> None:
        """What became of the row at that position, which was fetched."""
        if position == len(self._index):
            self._write(got)
            self._go_on()
            return
        data = got.picture.data if got.picture else b""
        self._early[position] = (_holding(got, b""), self._spool.seek(0, io.SEEK_END), len(data))
        self._spool.write(data)

    def index(self) -> pa.Table:
        """The index, once every row has its state: ours, and the columns of the slice that are to be kept."""
        count = len(self._index)
        if count != len(self._rows):
            raise RuntimeError(f"{len(self._rows)} rows went in and {count} came out")
        keep = self._table.drop_columns(SOURCE.names)
        columns = {name: [line.get(name) for line in self._index] for name in INDEX.names}
        columns |= {name: keep[name] for name in keep.column_names}
        return pa.table(columns, schema=pa.schema([*INDEX, *keep.schema]))

    def _go_on(self) -> None:
        """Writes all rows that are next in list order and known."""
        while (position := len(self._index)) < len(self._rows):
            if position in self._settled:
                line = dict(self._settled[position])
                if line["state"] == KEPT:
                    line["offset"] = self._put(next(self._samples))
                self._index.append(line)
            elif position in self._early:
                got, at, length = self._early.pop(position)
                self._spool.seek(at)
                self._write(_holding(got, self._spool.read(length)))
            else:
                return

    def _write(self, got: Outcome) -> None:
        """Picture, caption and facts into the tar, a line into the index."""
        row = self._rows[len(self._index)]
        line: dict[str, Any] = {name: row[name] for name in ("uid", "url", "caption")}
        line |= {"state": got.state, "sha256": got.sha256}
        if got.picture is not None:
            line |= {"width": got.picture.original_width, "height": got.picture.original_height}
            if got.state == KEPT:
                line["length"] = len(got.picture.data)
                line["offset"] = self._put(_members(line, got.picture, self._extension))
        self._index.append(line)

    def _put(self, members: Members) -> int:
        """Adds a sample; returns where the first member's bytes begin in the tar."""
        offset = self._tar.offset + tarfile.BLOCKSIZE  # behind that member's header of one block
        # Not TarFile.addfile, which copies each member's facts, keeps them, and takes a tenth of a row's time.
        written = b"".join(part for name, data in members for part in (header(name, len(data)), data, _rest(data)))
        self._tar.fileobj.write(written)
        self._tar.offset += len(written)
        return offset


def pack(
    action: Action,
    table: pa.Table,
    settled: Mapping[int, Mapping[str, Any]],
    take: Callable[[Sequence[int]], Iterable[tuple[int, Outcome]]],
    store: Store,
    out: Path,
    extension: str,
    earlier: Earlier | None = None,
) -> Record:
    """Writes `images.tar` and `index.parquet` to `out`. Blocks are ranges of the index.

    table, settled, extension: as for ShardWriter. take: from the positions of the rows that are neither settled nor
    forgotten to (position, outcome) of each, in any order. earlier: the shard that has the settled rows' pictures, and
    whose next generation this is. Raises RuntimeError where a row has no outcome.
    """
    gone = Forgotten.load(store).among(table)
    rows = table.select(SOURCE.names).to_pylist()
    lines = {position: {**row, "state": FORGOTTEN} for position, row in enumerate(rows) if gone[position]}
    lines |= {position: dict(line) for position, line in settled.items()}  # with what is in the tar; redacted below
    with ShardWriter(table, out, extension, lines, earlier.samples() if earlier else iter(())) as writer:
        expect_rows(len(rows))
        for line in lines.values():
            count_row(line["state"])
        for position, got in take([position for position in range(len(rows)) if position not in lines]):
            writer.add(position, got)
            count_row(got.state)
        index = writer.index()
    # Now, since a picture's digest is known only once it is there, and the list may have grown meanwhile.
    gone |= Forgotten.load(store).among(index)
    if gone.any():
        whole = (out / TAR).rename(out / "whole.tar")
        index = redact_tar(whole, index, gone, out / TAR)
        whole.unlink()
    return shard_record(action, index, out, earlier.generation + 1 if earlier else 0)


def shard_record(action: Action, index: pa.Table, out: Path, generation: int = 0) -> Record:
    """Writes the index beside the tar in `out`, and returns the record of both."""
    pq.write_table(index, out / TABLE, row_group_size=BLOCK_ROWS, compression="zstd")
    rows = index.num_rows
    blocks = [Block(TABLE, first, min(BLOCK_ROWS, rows - first)) for first in range(0, rows, BLOCK_ROWS)]
    states = Counter(index["state"].to_pylist())
    return Record.of(action, out, states=states, blocks=blocks, generation=generation)


def header(name: str, size: int) -> bytes:
    """What stands before a file in a tar, as `tarfile` has it for a TarInfo of this name and size: times and owners are
    zero. A name is ASCII, of up to 100 characters; a size is below 8 GiB."""
    block = bytearray(_HEADER)
    block[: len(name)] = name.encode("ascii")
    block[124:135] = b"%011o" % size
    block[148:156] = b" " * 8  # as what the sum's own place counts
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _rest(data: bytes) -> bytes:
    """Zeros up to the next block."""
    return bytes(-len(data) % tarfile.BLOCKSIZE)


def _members(line: Mapping[str, Any], picture: Picture, extension: str) -> Members:
    """The three members of a webdataset sample."""
    name = line["uid"].hex()
    facts = {
        "uid": name,
        "url": line["url"],
        "caption": line["caption"],
        "width": picture.width,
        "height": picture.height,
        "original_width": picture.original_width,
        "original_height": picture.original_height,
        "sha256": line["sha256"].hex(),
    }
    texts = ((f"{name}.txt", line["caption"].encode()), (f"{name}.json", canonical(facts)))
    return [(f"{name}.{extension}", picture.data), *texts]


def _holding(got: Outcome, data: bytes) -> Outcome:
    """The outcome with these bytes as its picture's."""
    return got if got.picture is None else replace(got, picture=replace(got.picture, data=data))
