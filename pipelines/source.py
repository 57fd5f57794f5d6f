"""URL lists → slices: reads Parquet, CSV or JSON lines as a stream and cuts them where the rows themselves say so.

A slice is what one shard of every later data stage is made from. Cuts depend on the rows near them alone, so an
inserted, deleted or appended row changes the slice that it is in, and at most that slice's neighbours.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import Refused
from infra.manifest import Action, Manifest, Record, digest_file
from infra.rows import INDEX, SOURCE, uid
from infra.store import NotFound, Store, open_store
from pipelines.stage import plain
from unclip.config import COUNT, outside

if TYPE_CHECKING:
    import pyarrow.dataset as ds

FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "json"}
LISTED = "listed"  # rows that are in a slice; their final state is decided downstream
REPEATED = "duplicate_row"  # URL and caption stand in the same slice before, or the whole slice came before
_CHUNK = 64 << 20


@dataclass(frozen=True)
class Columns:
    """What the columns of the list are called."""

    url: str = "url"
    """Column of the picture's address."""
    caption: str = "caption"
    """Column of the text that belongs to it."""
    keep: tuple[str, ...] = ()
    """Further columns to carry along into every index."""

    def __post_init__(self) -> None:
        taken = sorted({*INDEX.names} & {*self.keep})
        if taken:
            raise Refused(f"source.columns.keep names {', '.join(taken)}, unclip's own columns; leave out or rename")
        named = [self.url, self.caption, *self.keep]
        if not all(named):
            raise Refused("source.columns names a column without a name: write what the list calls it")
        if len({*named}) != len(named):
            raise Refused(f"source.columns names a column twice: {', '.join(named)}")


@dataclass(frozen=True)
class SourceSpec:
    """How a list is read and cut."""

    columns: Columns = field(default_factory=Columns)
    """Names of the list's columns."""
    rows_per_shard: int = 1000
    """Rows of a shard on average; a shard has between a quarter and four times as many."""

    def __post_init__(self) -> None:
        if wrong := outside(self, rows_per_shard=COUNT):
            raise Refused(f"source.{wrong}")


@dataclass(frozen=True)
class SourceHow:
    """Where the list lies, which is in no key: its digest is."""

    urls: str
    """A file (.parquet, .csv, .tsv, .jsonl) or a folder of such files, as a path or as s3://bucket/name."""


@dataclass(frozen=True)
class Source:
    """Stage: list files → slices. One action in all; facts["slices"] names the slices in list order."""

    spec: SourceSpec
    how: SourceHow
    digests: tuple[str, ...]
    """`list_digests(how.urls)`, taken by whoever builds the graph, since `actions` reads nothing."""
    name: str = "source"
    group: str = "source"
    version: int = 1
    needs: tuple[str, ...] = ()
    kind: str = "driver"

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        yield Action(f"{self.name}/{self.version}", plain(self.spec), self.digests)

    def setup(self) -> None:
        """Nothing to prepare."""

    def run(self, action: Action, store: Store, out: Path) -> Record:
        names: list[str] = []
        states = {LISTED: 0, REPEATED: 0}
        seen: set[str] = set()
        with _files(self.how.urls) as paths:
            if tuple(digest_file(path) for path in paths) != action.inputs:
                raise Refused(f"source.urls: {self.how.urls} changed while the run was under way; run again")
            for table in slices(_rows(paths, self.spec.columns), self.spec.rows_per_shard):
                path = out / f"{len(names):05d}.parquet"
                distinct = unique(table)
                pq.write_table(distinct, path, compression="zstd")
                # Two equal slices would be one action with one index: the second can only be counted.
                sha = digest_file(path)
                if sha in seen:
                    path.unlink()
                    states[REPEATED] += table.num_rows
                    continue
                seen.add(sha)
                names.append(path.name)
                states[LISTED] += distinct.num_rows
                states[REPEATED] += table.num_rows - distinct.num_rows
        if not names:
            raise Refused(f"source.urls: {self.how.urls} has no rows; name a list with at least one")
        return Record.of(action, out, states=states, facts={"slices": names})


def list_digests(urls: str) -> tuple[str, ...]:
    """SHA-256 (hex) of each list file, in reading order; Refused if there is none or one cannot be read."""
    if urls.startswith("s3://"):
        store, entries = _entries(urls)
        return tuple(_digest(_chunks(store, name, size)) for name, size in entries)
    try:
        return tuple(digest_file(path) for path in _paths(urls))
    except OSError as error:
        raise Refused(f"source.urls: {urls} cannot be read ({error.strerror or error})") from error


def check_columns(urls: str, columns: Columns) -> None:
    """Refused, naming the columns that there are, unless every list file can be read and has those wanted."""
    with _files(urls) as paths:
        for path in paths:
            _open(path, columns)


# Where to cut -------------------------------------------------------------------------------------------------------


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


# Reading lists ------------------------------------------------------------------------------------------------------


def _rows(paths: list[Path], columns: Columns) -> Iterator[pa.RecordBatch]:
    """Batches with the columns of SOURCE and those to keep; a null URL or caption stays null."""
    kept: pa.Schema | None = None
    for path in paths:
        found = _open(path, columns)
        schema = pa.schema([_plain(found.schema.field(name)) for name in columns.keep])
        if kept is not None and schema != kept:
            raise Refused(
                f"source.urls: {path.name} has other types in columns.keep than the files before it "
                f"({_types(schema)}, not {_types(kept)}); write all files of the list with one schema"
            )
        kept = schema
        try:
            for batch in found.to_batches(columns=[columns.url, columns.caption, *columns.keep]):
                urls, captions = (batch.column(n).cast(pa.string()) for n in (columns.url, columns.caption))
                pairs = zip(urls.to_pylist(), captions.to_pylist(), strict=True)
                names = pa.array([uid(url or "", caption or "") for url, caption in pairs], SOURCE.field("uid").type)
                extra = [batch.column(field.name).cast(field.type) for field in kept]
                yield pa.record_batch([names, urls, captions, *extra], schema=pa.schema([*SOURCE, *kept]))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise Refused(f"source.urls: {path.name} cannot be read to its end: {_one_line(error)}") from error


def _open(path: Path, columns: Columns) -> ds.Dataset:
    """A list file as a dataset; Refused unless it can be read and has the columns, URL and caption as text."""
    import pyarrow.csv as csv
    import pyarrow.dataset as ds

    kind: Any = FORMATS[path.suffix]
    if kind in ("csv", "tsv"):
        kind = ds.CsvFileFormat(
            parse_options=csv.ParseOptions(delimiter="\t" if kind == "tsv" else ",", newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types={n: pa.string() for n in (columns.url, columns.caption)}),
        )
    try:
        found = ds.dataset(path, format=kind)
    except (pa.ArrowException, OSError) as error:
        raise Refused(f"source.urls: {path} cannot be read as {path.suffix[1:]}: {_one_line(error)}") from error
    there = found.schema.names
    for key, name in [("url", columns.url), ("caption", columns.caption), *(("keep", name) for name in columns.keep)]:
        if name not in there:
            raise Refused(
                f"source.columns.{key}: {path.name} has no column {name!r}. Its columns: {', '.join(there) or 'none'}."
            )
    for key, name in (("url", columns.url), ("caption", columns.caption)):
        kind = _plain(found.schema.field(name)).type
        if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
            raise Refused(f"source.columns.{key}: column {name!r} of {path.name} holds {kind}, not text; name another")
    return found


def _plain(field: pa.Field) -> pa.Field:
    """The field without metadata, and without a dictionary, whose order would depend on the file."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    return pa.field(field.name, kind)


def _types(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


# Finding lists ------------------------------------------------------------------------------------------------------


@contextmanager
def _files(urls: str) -> Iterator[list[Path]]:
    """The list's files in reading order; those of S3 are copied, since a list, unlike an object, may change."""
    if not urls.startswith("s3://"):
        yield _paths(urls)
        return
    store, entries = _entries(urls)
    with tempfile.TemporaryDirectory(prefix="unclip-list-") as folder:
        copies = []
        for number, (name, size) in enumerate(entries):
            copies.append(Path(folder, f"{number:05d}-{Path(name).name}"))
            with open(copies[-1], "wb") as file:
                file.writelines(_chunks(store, name, size))
        yield copies


def _paths(urls: str) -> list[Path]:
    path = Path(urls).expanduser()
    if path.is_dir():
        paths = sorted(child for child in path.iterdir() if child.suffix in FORMATS and child.is_file())
        if not paths:
            raise Refused(f"source.urls: the folder {urls} has no file that ends in {', '.join(FORMATS)}")
        return paths
    if not path.is_file():
        raise Refused(f"source.urls: there is no file or folder {urls!r}")
    if path.suffix not in FORMATS:
        raise Refused(f"source.urls: {path.name} ends in none of {', '.join(FORMATS)}")
    return [path]


def _entries(urls: str) -> tuple[Store, list[tuple[str, int]]]:
    """The S3 store of a list and (name, bytes) of its files: one object, or all lists directly below a prefix."""
    parent, _, last = urls.rstrip("/").rpartition("/")
    one = Path(last).suffix in FORMATS and parent != "s3:/"
    store = open_store(parent if one else urls.rstrip("/"), create=False)
    try:
        listed = [(entry.name, entry.bytes) for entry in store.list(last if one else "")]
    except NotFound as error:
        raise Refused(f"source.urls: {urls} cannot be read: {error}") from error
    wanted = [
        (name, size)
        for name, size in listed
        if (name == last if one else "/" not in name and Path(name).suffix in FORMATS)
    ]
    if not wanted:
        raise Refused(f"source.urls: {urls} has no object that ends in {', '.join(FORMATS)}")
    return store, wanted


def _chunks(store: Store, name: str, size: int) -> Iterator[bytes]:
    for start in range(0, size, _CHUNK):
        yield store.get(name, start, min(_CHUNK, size - start))


def _digest(chunks: Iterable[bytes]) -> str:
    total = hashlib.sha256()
    for chunk in chunks:
        total.update(chunk)
    return total.hexdigest()
