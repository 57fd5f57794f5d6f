"""Rows and what became of them → a shard: webdataset tar and an index in which every row of the slice has its state.

Tars are in the slice's order with times and owners of zero. What was forgotten (infra/forgotten.py) is neither fetched
nor kept.
"""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.forgotten import FORGOTTEN, Forgotten
from infra.manifest import Action, Block, Record, canonical
from infra.rows import INDEX, KEPT, SOURCE
from infra.store import Store
from pipelines.pictures import Picture
from pipelines.redact import redact

TAR, TABLE = "images.tar", "index.parquet"
BLOCK_ROWS = 256


@dataclass(frozen=True)
class Outcome:
    """A row's final state here; SHA-256 of what was fetched and the picture as far as it got."""

    state: str
    sha256: bytes | None = None
    picture: Picture | None = None


def pack(
    action: Action,
    table: pa.Table,
    outcomes: Callable[[Sequence[int]], Iterable[tuple[int, Outcome]]],
    store: Store,
    out: Path,
    extension: str,
) -> Record:
    """Writes `images.tar` and `index.parquet` to `out`. Blocks are ranges of the index.

    table: the slice, columns of SOURCE and then those to carry along. outcomes: from the numbers of the rows that are
    not forgotten to (number, outcome) of each, in any order; what comes early waits for the rows before it. extension:
    jpg, png or webp, of the kept pictures. Raises RuntimeError where a row has no outcome.
    """
    rows = table.select(SOURCE.names).to_pylist()
    gone = Forgotten.load(store).among(table)
    index: list[dict[str, Any]] = []
    early = {number: Outcome(FORGOTTEN) for number in range(len(rows)) if gone[number]}
    with tarfile.open(out / TAR, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, got in outcomes([number for number in range(len(rows)) if not gone[number]]):
            early[number] = got
            _flush(early, rows, tar, index, extension)
        _flush(early, rows, tar, index, extension)
    if len(index) != len(rows):
        raise RuntimeError(f"{len(rows)} rows went in and {len(index)} came out")
    keep = table.drop_columns(SOURCE.names)
    columns = {name: [line.get(name) for line in index] for name in INDEX.names}
    columns |= {name: keep[name] for name in keep.column_names}
    made = pa.table(columns, schema=pa.schema([*INDEX, *keep.schema]))
    # Now, since a picture's digest is known only once it is there, and the list may have grown meanwhile.
    gone |= Forgotten.load(store).among(made)
    if gone.any():
        whole = (out / TAR).rename(out / "whole.tar")
        made = redact(whole, made, gone, out / TAR)
        whole.unlink()
    return shard(action, made, out)


def shard(action: Action, index: pa.Table, out: Path, generation: int = 0) -> Record:
    """Writes the index beside the tar in `out`, and returns the record of both."""
    pq.write_table(index, out / TABLE, row_group_size=BLOCK_ROWS, compression="zstd")
    rows = index.num_rows
    blocks = [Block(TABLE, first, min(BLOCK_ROWS, rows - first)) for first in range(0, rows, BLOCK_ROWS)]
    states = Counter(index["state"].to_pylist())
    return Record.of(action, out, states=states, blocks=blocks, generation=generation)


def _flush(
    early: dict[int, Outcome],
    rows: Sequence[dict[str, Any]],
    tar: tarfile.TarFile,
    index: list[dict[str, Any]],
    extension: str,
) -> None:
    """Writes all rows that are next in list order: picture, caption and facts into the tar, a line into the index."""
    while len(index) in early:
        got, row = early.pop(len(index)), rows[len(index)]
        line: dict[str, Any] = {name: row[name] for name in ("uid", "url", "caption")}
        line |= {"state": got.state, "sha256": got.sha256}
        if got.picture is not None:
            line |= {"width": got.picture.original_width, "height": got.picture.original_height}
            if got.state == KEPT:
                line["length"] = len(got.picture.data)
                line["offset"] = _add_sample(tar, line, got.picture, extension)
        index.append(line)


def _add_sample(tar: tarfile.TarFile, line: dict[str, Any], picture: Picture, extension: str) -> int:
    """Adds the three members of a webdataset sample and returns where the picture's bytes begin in the tar."""
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
    offset = _add(tar, f"{name}.{extension}", picture.data)
    _add(tar, f"{name}.txt", line["caption"].encode())
    _add(tar, f"{name}.json", canonical(facts))
    return offset


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    member = tarfile.TarInfo(name)  # mtime, uid and gid are 0, and owners have no names
    member.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE  # behind the member's header of one block
    tar.addfile(member, io.BytesIO(data))
    return offset
