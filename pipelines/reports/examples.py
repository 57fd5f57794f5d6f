"""Examples of what each rule took, for people to see whether it took what it was meant to take.

They are read from the selections, so nothing of them is stored, and no key depends on how many there are.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.records import KEPT, Manifest, Record, object_name
from infra.store import Store
from pipelines.download import picture
from pipelines.select import ROW_SOURCES
from pipelines.select.rules import kind_of

if TYPE_CHECKING:
    from PIL.Image import Image

SHARDS = 100
"""Shards that are looked into: a rule that took none of their rows has no example."""
UNSEEN = frozenset({"nsfw"})
"""Kinds of rules whose pictures are not shown; their uids and captions are."""


@dataclass(frozen=True)
class Example:
    """A row that a rule took."""

    uid: str
    """In hex."""
    caption: str
    url: str
    image: Image | None
    """The picture in RGB; None where it cannot be decoded or is not to be seen."""


def examples(store: Store, group: str, data: Manifest, selection: Manifest, most: int = 4) -> dict[str, list[Example]]:
    """Rule → the first rows in manifest order that it took, `most` at most, of the first `SHARDS` shards.

    group: filter or curate; data: what that group's rules were applied to; selection: what came of it.
    """
    found: dict[str, list[Example]] = {rule: [] for rule in selection.states if rule != KEPT}
    for shard in islice(data.records, SHARDS):
        if all(len(some) >= most for some in found.values()):
            break
        marks = _read(store, selection.only.sha(f"{shard.sha(ROW_SOURCES[group].file)}.parquet"))
        for rule, some in found.items():
            taken = marks.filter(pc.equal(marks["rule"], rule))["uid"][: most - len(some)]
            if len(taken):
                some += _rows(store, group, shard, taken.combine_chunks(), seen=kind_of(rule) not in UNSEEN)
    return found


def _rows(store: Store, group: str, shard: Record, uids: pa.Array, *, seen: bool) -> Iterator[Example]:
    over = ROW_SOURCES[group]
    columns = ["uid", "caption", "url", *(("offset", "length") if over.pictures else ("image",))]
    table = _read(store, shard.sha(over.file), columns)
    for row in table.filter(pc.is_in(table["uid"], value_set=uids)).to_pylist():
        image = _image(store, shard, over.pictures, row) if seen else None
        yield Example(row["uid"].hex(), row["caption"] or "", row["url"] or "", image)


def _image(store: Store, shard: Record, pictures: str | None, row: dict[str, Any]) -> Image | None:
    """The picture of one row, of which no more than its own bytes are fetched."""
    data = store.get(object_name(shard.sha(pictures)), row["offset"], row["length"]) if pictures else row["image"]
    return picture(io.BytesIO(data), 0, len(data))


def _read(store: Store, sha256: str, columns: list[str] | None = None) -> pa.Table:
    return pq.read_table(store.local(object_name(sha256)), columns=columns)
