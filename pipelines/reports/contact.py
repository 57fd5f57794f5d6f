"""Rows with their pictures, for contact sheets: of each picture only its own bytes are fetched, and shown is a small
copy that was encoded anew, so that nothing of a stranger's file reaches a page but its pixels.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from infra.concurrent import map_ordered
from infra.records import Manifest, columns, object_name
from infra.store import Store
from pipelines.download import TABLE, TAR, picture
from pipelines.reports.census import THREADS, Row, Shard, shards
from pipelines.reports.examples import UNSEEN
from pipelines.reports.page import thumbnail

CAPTION = 200
"""Characters of a caption that are kept."""


@dataclass(frozen=True)
class SheetRow:
    """A row as it is shown."""

    uid: str
    """In hex, as far as a page names it."""
    caption: str
    sides: str
    """Of the original: "640 × 480"."""
    score: float | None
    """CLIP's cosine of picture and caption, if it was embedded."""
    uri: str | None
    """The picture as a data URI; None where it cannot be decoded or is not to be seen."""


def sheet_rows(
    store: Store, made: Mapping[str, Manifest], rows: Iterable[Row], threads: int = THREADS
) -> dict[bytes, SheetRow]:
    """uid → the row as it is shown, of these rows of a data set."""
    wanted: dict[int, set[bytes]] = defaultdict(set)
    for row in rows:
        wanted[row.shard].add(row.uid)
    there = (shard for shard in shards(made) if shard.number in wanted)
    read = map_ordered(lambda shard: _of_shard(store, shard, wanted[shard.number]), there, threads)
    return {uid: one for part in read for uid, one in part.items()}


def _of_shard(store: Store, shard: Shard, uids: set[bytes]) -> dict[bytes, SheetRow]:
    names = ["uid", "caption", "offset", "length", "width", "height"]
    index = _only(columns(store, shard.download.files[TABLE], names), uids)
    scores: dict[bytes, float] = {}
    if shard.embed is not None:
        embedded = _only(columns(store, shard.embed.files["rows.parquet"], ["uid", "score"]), uids)
        scores = dict(zip(embedded["uid"].to_pylist(), embedded["score"].to_pylist(), strict=True))
    hidden = _hidden(store, shard, uids)
    tar = object_name(shard.download.sha(TAR))
    found = {}
    for line in index.to_pylist():
        uri = None
        if line["offset"] is not None and line["uid"] not in hidden:
            data = store.get(tar, line["offset"], line["length"])
            uri = thumbnail(picture(io.BytesIO(data), 0, len(data)))
        sides = f"{line['width']} × {line['height']}" if line["width"] else ""
        caption = " ".join((line["caption"] or "").split())[:CAPTION]
        found[line["uid"]] = SheetRow(line["uid"].hex()[:12], caption, sides, scores.get(line["uid"]), uri)
    return found


def _hidden(store: Store, shard: Shard, uids: set[bytes]) -> set[bytes]:
    """Those of these rows whose pictures are not to be seen, for whatever reason the page would show them."""
    hidden: set[bytes] = set()
    for selection in filter(None, (shard.filtered, shard.curated)):
        table = _only(columns(store, selection, ["uid", "rule"]), uids)
        hidden.update(table.filter(pc.is_in(table["rule"], value_set=pa.array(sorted(UNSEEN))))["uid"].to_pylist())
    return hidden


def _only(table: pa.Table, uids: set[bytes]) -> pa.Table:
    """The lines of these rows."""
    return table.filter(pc.is_in(table["uid"], value_set=pa.array(sorted(uids), table["uid"].type)))
