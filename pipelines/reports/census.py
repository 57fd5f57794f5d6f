"""What the rows of a data set are like, counted shard by shard in bounded memory: hosts, sides, captions, scores.

A shard is reduced to a few arrays and the rows that are candidates for being shown (count.py does so once and for all,
in two small files); these are added up in manifest order. Nothing grows with the number of shards but the table of
hosts, and that has a bound (`Hosts`).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.concurrent import map_ordered
from infra.errors import Refused
from infra.records import KEPT, SELECTION, File, Manifest, Record, columns
from infra.store import Store
from pipelines.download import TABLE

ROWS = "rows.parquet"
COUNTS, SHOWN = "counts.parquet", "shown.parquet"
COUNTED = pa.schema([("what", pa.string()), ("of", pa.string()), ("state", pa.string()), ("rows", pa.int64())])
"""counts.parquet: hosts by state ("host", its name, …), and bins of histograms (its name, the bin, stays or goes)."""
THREADS = 8
"""Shards that are read at a time."""
ASPECT, WIDEST = 6, 24  # bins of width over height a doubling, and of the widest on either side of 1
SIDE, CHARACTERS, WORDS = 8192, 2000, 400  # what is longer is counted as this
SCORES = 400  # bins of the cosine, from -1 to 1
SHEET, OF_RULE = 48, 6
"""Rows on a contact sheet, and examples of a rule."""

_HOST = r"^\s*[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?(?P<host>\[[^\]]*\]|[^/:?#]*)"


Tables = tuple[File, File | None, File | None, File | None]
"""Of a shard: the index, the selection of filter, the embedded rows, the selection of curate."""


@dataclass(frozen=True)
class Shard:
    """The files of one shard, through the stages as far as they were made."""

    number: int
    download: Record
    filtered: File | None = None
    embed: Record | None = None
    curated: File | None = None

    @property
    def tables(self) -> Tables:
        """What is counted."""
        embedded = self.embed.files[ROWS] if self.embed is not None else None
        return self.download.files[TABLE], self.filtered, embedded, self.curated


def shards(made: Mapping[str, Manifest]) -> Iterator[Shard]:
    """The shards of a data set: download, and what of filter, embed and curate there is."""
    embeds: Sequence[Record | None] = (
        made["embed"].records if "embed" in made else [None] * len(made["download"].records)
    )
    if len(embeds) != len(made["download"].records):
        raise Refused("embed and download have another number of shards: these versions do not belong together", code=5)
    for number, (record, embed) in enumerate(zip(made["download"].records, embeds, strict=True)):
        filtered = made["filter"].only.files[f"{record.sha(TABLE)}.parquet"] if "filter" in made else None
        curated = None
        if embed is not None and "curate" in made:
            curated = made["curate"].only.files[f"{embed.sha(ROWS)}.parquet"]
        yield Shard(number, record, filtered, embed, curated)


@dataclass
class Hosts:
    """Rows by host and state, in bounded memory, in the manner of lossy counting (Manku and Motwani, VLDB 2002, 4.2):
    of twice `most` hosts the rarer half is dropped, and begins anew when it comes again.
    """

    most: int = 25_000
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    missed: int = 0
    """A host's rows are at most this many too few; 0: all counts are exact."""

    def add(self, host: str, state: str, rows: int) -> None:
        """So many rows more of a host ended in a state."""
        self.counts.setdefault(host, Counter())[state] += rows
        if len(self.counts) > 2 * self.most:
            ranked = sorted(self.counts.items(), key=lambda one: (-one[1].total(), one[0]))
            self.missed += ranked[self.most][1].total()
            self.counts = dict(ranked[: self.most])


@dataclass(frozen=True, order=True)
class Row:
    """A row that may be shown: those with the smallest keys are, which is a random choice that no order changes."""

    key: int
    """The last 8 bytes of its uid, which is a digest."""
    shard: int
    uid: bytes
    why: str = ""
    """The rule that took it, as "filter.size"; empty where it stays."""


@dataclass
class Part:
    """What is counted of some shards. Arrays are [2, bins]: first the rows that stay to the end, then all others that
    were downloaded; of scores, others that were embedded."""

    hosts: list[tuple[str, str, int]] = field(default_factory=list)
    sides: np.ndarray = field(default_factory=lambda: np.zeros((2, SIDE + 1), np.int64))
    aspects: np.ndarray = field(default_factory=lambda: np.zeros((2, 2 * WIDEST + 1), np.int64))
    characters: np.ndarray = field(default_factory=lambda: np.zeros((2, CHARACTERS + 1), np.int64))
    words: np.ndarray = field(default_factory=lambda: np.zeros((2, WORDS + 1), np.int64))
    scores: np.ndarray = field(default_factory=lambda: np.zeros((2, SCORES), np.int64))
    shown: dict[str, list[Row]] = field(default_factory=dict)
    """Sheet ("kept", "rejected", or a rule's name as in `Row.why`) → rows that may be on it."""


ARRAYS = ("sides", "aspects", "characters", "words", "scores")
STATES = ("stays", "goes")
"""What the two rows of an array count."""


@dataclass
class DatasetStats(Part):
    """All parts together."""

    by_host: Hosts = field(default_factory=Hosts)

    def add(self, part: Part) -> None:
        """Adds the part of a further shard."""
        for host, state, rows in part.hosts:
            self.by_host.add(host, state, rows)
        for name in ARRAYS:
            getattr(self, name)[:] += getattr(part, name)
        for sheet, rows_ in part.shown.items():
            self.shown[sheet] = heapq.nsmallest(_most(sheet), [*self.shown.get(sheet, ()), *rows_])


def count_dataset(store: Store, made: Mapping[str, Manifest], threads: int = THREADS) -> DatasetStats:
    """Adds up what stage `data-count` counted of each shard. Where it did not run, goes once through the rows, and
    reads no more than the columns that are counted."""
    total = DatasetStats()
    if "data-count" in made:
        records = enumerate(made["data-count"].records)
        parts = map_ordered(lambda one: stored(store, one[1], one[0]), records, threads)
    else:
        parts = map_ordered(lambda shard: count_shard(store, shard.tables, shard.number), shards(made), threads)
    for part in parts:
        total.add(part)
    return total


def count_shard(store: Store, tables: Tables, number: int = 0) -> Part:
    """What is counted of the shard of that number."""
    listed, filtered, rows_file, curated = tables
    part = Part()
    index = columns(store, listed, ["uid", "url", "caption", "state", "width", "height"])
    part.hosts = _hosts(index)
    rows = index.filter(pc.equal(index["state"], KEPT))
    taken: dict[str, pa.Array] = {}
    stays = rows["uid"].combine_chunks()
    if filtered is not None:
        stays = _judged(columns(store, filtered, ["uid", "rule"]), "filter", taken)
    if rows_file is not None:
        embedded = columns(store, rows_file, ["uid", "score"])
        stays = embedded["uid"].combine_chunks()
        if curated is not None:
            stays = _judged(columns(store, curated, ["uid", "rule"]), "curate", taken)
        cosine = embedded["score"].combine_chunks()
        known = np.nan_to_num(cosine.to_numpy(zero_copy_only=False).astype(np.float64))
        which = pc.is_in(embedded["uid"], value_set=stays).to_numpy()
        part.scores = _split(np.floor((known + 1) * (SCORES / 2)), which, SCORES - 1)
    which = pc.is_in(rows["uid"], value_set=stays).to_numpy()
    width, height = (_numbers(rows[name]) for name in ("width", "height"))
    part.sides = _split(np.minimum(width, height), which, SIDE)
    aspect = np.clip(np.round(ASPECT * np.log2(width / height)), -WIDEST, WIDEST)
    part.aspects = _split(aspect + WIDEST, which, 2 * WIDEST)
    caption = pc.fill_null(rows["caption"], "")
    part.characters = _split(pc.utf8_length(caption).to_numpy(), which, CHARACTERS)
    words = pc.list_value_length(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(caption))).to_numpy()
    words = np.where(pc.utf8_length(pc.utf8_trim_whitespace(caption)).to_numpy() > 0, words, 0)
    part.words = _split(words, which, WORDS)
    candidates = _chosen(stays, number, "", SHEET)
    for rule, uids in taken.items():
        candidates += _chosen(uids, number, rule, SHEET)
    part.shown = _sheets(candidates)
    return part


def _sheets(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Sheet → those of these rows that may be on it."""
    sheets: dict[str, list[Row]] = {"kept": [], "rejected": []}
    for row in rows:
        sheets["rejected" if row.why else "kept"].append(row)
        if row.why:
            sheets.setdefault(row.why, []).append(row)
    return {sheet: heapq.nsmallest(_most(sheet), some) for sheet, some in sheets.items()}


def write(part: Part, out: Path) -> None:
    """The part of a shard as two files: `COUNTS`, and `SHOWN`, which says of each row what a selection says."""
    lines = [("host", *one) for one in part.hosts]
    for name in ARRAYS:
        for state, bins in zip(STATES, getattr(part, name), strict=True):
            lines += [(name, str(at), state, int(bins[at])) for at in np.flatnonzero(bins).tolist()]
    counts = pa.table({name: [line[at] for line in lines] for at, name in enumerate(COUNTED.names)}, schema=COUNTED)
    pq.write_table(counts, out / COUNTS, compression="zstd")
    rows = sorted({row for some in part.shown.values() for row in some})
    shown = pa.table([[row.uid for row in rows], [row.why or None for row in rows]], schema=SELECTION)
    pq.write_table(shown, out / SHOWN, compression="zstd")


def stored(store: Store, record: Record, number: int) -> Part:
    """The inverse of `write`, for the shard of that number."""
    part = Part()
    counts = columns(store, record.files[COUNTS], COUNTED.names).to_pydict()
    for what, of, state, rows in zip(*(counts[name] for name in COUNTED.names), strict=True):
        if what == "host":
            part.hosts.append((of, state, rows))
        else:
            getattr(part, what)[STATES.index(state), int(of)] = rows
    shown = columns(store, record.files[SHOWN], SELECTION.names).to_pydict()
    part.shown = _sheets([_row(uid, number, why or "") for uid, why in zip(shown["uid"], shown["rule"], strict=True)])
    return part


def _most(sheet: str) -> int:
    return SHEET if sheet in ("kept", "rejected") else OF_RULE


def _judged(selection: pa.Table, group: str, taken: dict[str, pa.Array]) -> pa.Array:
    """uids that stay; those of each rule that took some join `taken`."""
    uids, rules = selection["uid"].combine_chunks(), selection["rule"].combine_chunks()
    for rule in pc.unique(rules.drop_null()).to_pylist():
        taken[f"{group}.{rule}"] = uids.filter(pc.fill_null(pc.equal(rules, rule), False))
    return uids.filter(pc.is_null(rules))


def _hosts(index: pa.Table) -> list[tuple[str, str, int]]:
    """(host, state, rows); "" where a URL names no host."""
    matched = pc.extract_regex(pc.fill_null(index["url"], ""), _HOST)
    host = pc.utf8_lower(pc.fill_null(pc.struct_field(matched, "host"), ""))
    found = pa.table({"host": host, "state": index["state"]}).group_by(["host", "state"]).aggregate([([], "count_all")])
    return sorted(zip(*(found[name].to_pylist() for name in ("host", "state", "count_all")), strict=True))


def _chosen(uids: pa.Array, shard: int, why: str, most: int) -> list[Row]:
    """The rows with the smallest keys of these uids."""
    if not len(uids):
        return []
    raw = np.frombuffer(b"".join(uids.to_pylist()), np.dtype(">u8")).reshape(len(uids), 2)[:, 1]
    first = np.argsort(raw, kind="stable")[:most]
    return [_row(uids[int(at)].as_py(), shard, why) for at in first]


def _row(uid: bytes, shard: int, why: str) -> Row:
    return Row(int.from_bytes(uid[8:], "big"), shard, uid, why)


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A column of pixels as float64; what is not known is 1."""
    return np.maximum(pc.fill_null(column, 1).to_numpy().astype(np.float64), 1)


def _split(values: np.ndarray, stays: np.ndarray, most: int) -> np.ndarray:
    """int64 [2, most + 1]: how many of the rows that stay, and of the others, have each value; beyond, the last."""
    whole = np.clip(values, 0, most).astype(np.int64)
    return np.stack([np.bincount(whole[which], minlength=most + 1) for which in (stays, ~stays)])
