"""A slice of tars or of a folder → a shard of pictures, in `download`'s place: nothing is fetched from the web.

The pictures' bytes are read from where the source lies and go through the same checks, resizing and packing as those
that a server gave, so that every stage behind finds what it finds behind a download.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from infra.concurrent import map_unordered
from infra.errors import Refused
from infra.records import KEPT, MEMBER, SOURCE, Action, Record, object_name, sample_uid
from infra.store import Store
from pipelines.download.images import DECODE_S, PictureSpec
from pipelines.download.isolate import picture_decoder
from pipelines.download.shard import Outcome, Packing, pack
from pipelines.download.stage import DownloadHow, DownloadSpec
from pipelines.source import Unreadable, open_location
from unclip.config import AMOUNT, COUNT, outside

DECIDING = ("opt_out", "block", "block_file", "retry_pass", "retry_states")
"""Settings of a download that decide about rows, or ask for work. Whoever sets one relies on it."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GatherHow:
    """How the pictures are read."""

    where: str
    """The folder, or s3:// prefix, that the slices' file names are relative to; every node must see it."""
    threads: int = 16
    """Pictures read at a time, a task."""
    cpus: float = 1
    """CPUs that Ray reserves a task."""
    isolate: bool = False
    decode_s: float = 60.0
    """Both as DownloadHow's."""

    def __post_init__(self) -> None:
        if wrong := outside(self, threads=COUNT, cpus=AMOUNT, decode_s=DECODE_S):
            raise Refused(f"download.{wrong}")


@dataclass(frozen=True)
class Gather(Packing):
    """Stage: each slice → a shard as `Download` leaves it, under its name, of pictures that are there."""

    how: GatherHow

    def carefully(self) -> Gather:
        """The stage as it does a shard that ended its workers."""
        return replace(self, how=replace(self.how, isolate=True))

    def run(self, action: Action, store: Store, out: Path) -> Record:
        table = pq.read_table(store.local(object_name(action.inputs[0])))
        rows = table.select([*SOURCE.names, MEMBER.name]).to_pylist()
        states = {position: state for position, row in enumerate(rows) if (state := self._untaken(row))}
        settled = {position: {**rows[position], "state": state} for position, state in states.items()}
        listed = table.drop_columns([MEMBER.name])
        return pack(action, listed, settled, lambda wanted: self._taken(rows, wanted), store, out, self.spec.format)

    def _taken(self, rows: Sequence[dict[str, Any]], wanted: Sequence[int]) -> Iterator[tuple[int, Outcome]]:
        """(position, outcome) of the rows at these positions, as they are read."""
        there = open_location(self.how.where)

        def read(position: int) -> bytes:
            member = rows[position][MEMBER.name]
            try:
                return there.get(member["file"], member["start"], member["bytes"])
            except Unreadable as error:
                raise self._changed(str(error)) from error

        with picture_decoder(self.spec, self.how.isolate, self.how.decode_s) as prepare:
            for which, data in map_unordered(read, wanted, self.how.threads):
                row, sha = rows[wanted[which]], hashlib.sha256(data).digest()
                if sample_uid(sha, row["caption"]) != row["uid"]:
                    raise self._changed(row["url"])
                picture = prepare(data)
                yield wanted[which], Outcome(picture.state or KEPT, sha, picture)

    def _untaken(self, row: dict[str, Any]) -> str | None:
        """The state that a row has without its picture being read, or None."""
        member = row[MEMBER.name]
        if member["wrong"]:
            return str(member["wrong"])
        if not (row["caption"] or "").strip():
            return "no_caption"
        return "too_many_bytes" if member["bytes"] > self.spec.max_bytes else None

    def _changed(self, what: str) -> Refused:
        return Refused(
            f"{self.how.where} no longer holds what it held when it was listed ({what}); run again, so that it is "
            "listed anew",
            code=5,
        )


def check_unused(section: Any, source: str) -> None:
    """Tells which settings of the recipe's section `download` mean nothing, since nothing is fetched; Refused where one
    of them decides about rows. source: the key of the recipe that says where the pictures are, as "source.tars".
    """
    used = {item.name for cls in (PictureSpec, GatherHow) for item in fields(cls)}
    unused = [
        item.name
        for cls in (DownloadSpec, DownloadHow)
        for item in fields(cls)
        if item.name not in used and hasattr(section, item.name) and getattr(section, item.name) != _default(item)
    ]
    if relied := [name for name in unused if name in DECIDING]:
        raise Refused(
            f"download.{relied[0]} means nothing with {source}, where nothing is fetched: leave it out. "
            "Rules of `filter` reject rows of such a source."
        )
    if unused:
        names = ", ".join(f"download.{name}" for name in unused)
        log.warning("%s: no effect with %s, whose pictures are there and not fetched", names, source)


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()
