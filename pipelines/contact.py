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

from infra.manifest import File, Manifest, Record, object_name
from infra.store import Store
from pipelines.census import THREADS, Row
from pipelines.columns import ahead, columns
from pipelines.pack import TABLE, TAR
from pipelines.page import thumbnail
from pipelines.pictures import picture
from pipelines.rejected import UNSEEN

CAPTION = 200
"""Characters of a caption that are kept."""


@dataclass(frozen=True)
class Seen:
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


def seen(store: Store, made: Mapping[str, Manifest], rows: Iterable[Row], threads: int = THREADS) -> dict[bytes, Seen]:
    """uid → the row as it is shown, of these rows of a data set."""
    wanted: dict[int, dict[bytes, Row]] = defaultdict(dict)
    for row in rows:
        known = wanted[row.shard].get(row.uid)
        if known is None or row.why:  # what took it says whether it may be seen
            wanted[row.shard][row.uid] = row
    embeds = made["embed"].records if "embed" in made else ()

    def read(number: int) -> dict[bytes, Seen]:
        embed = embeds[number].files["rows.parquet"] if embeds else None
        return _of_shard(store, made["download"].records[number], embed, wanted[number])

    return {uid: one for part in ahead(read, sorted(wanted), threads) for uid, one in part.items()}


def _of_shard(store: Store, download: Record, embed: File | None, rows: Mapping[bytes, Row]) -> dict[bytes, Seen]:
    names = ["uid", "caption", "offset", "length", "width", "height"]
    index = _only(columns(store, download.files[TABLE], names), rows)
    scores = _only(columns(store, embed, ["uid", "score"]), rows) if embed else None
    score = dict(zip(scores["uid"].to_pylist(), scores["score"].to_pylist(), strict=True)) if scores else {}
    tar = object_name(download.sha(TAR))
    found = {}
    for line in index.to_pylist():
        uri = None
        if line["offset"] is not None and rows[line["uid"]].why.partition(".")[2] not in UNSEEN:
            data = store.get(tar, line["offset"], line["length"])
            uri = thumbnail(picture(io.BytesIO(data), 0, len(data)))
        sides = f"{line['width']} × {line['height']}" if line["width"] else ""
        caption = " ".join((line["caption"] or "").split())[:CAPTION]
        found[line["uid"]] = Seen(line["uid"].hex()[:12], caption, sides, score.get(line["uid"]), uri)
    return found


def _only(table: pa.Table, rows: Mapping[bytes, Row]) -> pa.Table:
    """The lines of these rows."""
    return table.filter(pc.is_in(table["uid"], value_set=pa.array(list(rows), table["uid"].type)))
