"""What a run is made from → slices: a URL list, tars that exist already, or a folder of pictures.

A slice is what one shard of every later data stage is made from (cut.py says where one ends). A list's rows are
fetched by `download`, those of tars and folders, whose pictures are there, are taken by `gather` in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from infra.documents import digest_file
from infra.errors import Refused
from infra.records import LISTED, Action, Manifest, Record
from infra.store import Store
from pipelines.source.columns import Columns
from pipelines.source.cut import slices, unique
from pipelines.source.kinds import SOURCES
from pipelines.stage import StageBase, plain
from unclip.config import COUNT, outside

REPEATED = "duplicate_row"  # uid stands in the same slice before, or the whole slice came before


@dataclass(frozen=True)
class SourceSpec:
    """How a source is read and cut."""

    columns: Columns = field(default_factory=Columns)
    """Names of the list's columns."""
    rows_per_shard: int = 1000
    """Rows of a shard on average; a shard has between a quarter and four times as many."""

    def __post_init__(self) -> None:
        if wrong := outside(self, rows_per_shard=COUNT):
            raise Refused(f"source.{wrong}")


@dataclass(frozen=True)
class SourceHow:
    """Where the source lies, which is in no key: its digests are. Just one of the three is said."""

    urls: str | None = None
    """A list of URLs: a file (.parquet, .csv, .tsv, .jsonl), a folder of such files or a glob, as a path or as
    s3://bucket/name."""
    tars: str | None = None
    """Webdataset tars that exist already: a file (.tar), a folder of such files or a glob, as a path or s3://."""
    folder: str | None = None
    """A folder of pictures, as a path or s3://, with a .txt beside each or a metadata.csv, .jsonl or .parquet."""

    uri: str | None = None
    """kind://location, for a kind that a plug-in added to `SOURCES`."""

    def __post_init__(self) -> None:
        said = [name for name in ("urls", "tars", "folder", "uri") if getattr(self, name)]
        if len(said) > 1:
            raise Refused(f"source: {' and '.join(said)} are given; a run has one source, leave one of them")
        if not said:
            raise Refused("source.urls is missing: name a list of URLs, or source.tars, or source.folder")
        if self.kind not in SOURCES:
            raise Refused(f"source.uri is {self.uri!r}, and no plug-in adds a kind of source {self.kind!r}")

    @property
    def kind(self) -> str:
        """Its key in `SOURCES`."""
        if self.uri:
            return self.uri.partition("://")[0]
        return "tars" if self.tars else "folder" if self.folder else "urls"

    @property
    def location(self) -> str:
        """Where it lies, as its kind takes it."""
        return str(self.uri).partition("://")[2] if self.uri else str(getattr(self, self.kind))

    @property
    def fetched(self) -> bool:
        """Whether its pictures are fetched from URLs; else they are there."""
        return SOURCES[self.kind].pictures is None

    @property
    def samples(self) -> str | None:
        """Where the pictures lie that are there, absolute: what the file names in their slices are relative to."""
        pictures = SOURCES[self.kind].pictures
        if pictures is None:
            return None
        where = pictures(self.location)
        if "://" in where:
            return where
        return str(Path(where).expanduser().absolute())  # a worker has another working directory

    def unread(self, columns: Columns) -> int:
        """Bytes that `digests` would read, since they are new or have changed. Refused where they cannot be found."""
        return SOURCES[self.kind].unread(self.location, columns)

    def size(self) -> int:
        """How large it is. Refused where it cannot be found."""
        return SOURCES[self.kind].size(self.location)

    def digests(self, columns: Columns) -> tuple[str, ...]:
        """What the source holds, as the inputs of its action: reads what is not remembered of it (digest_cache.py).
        Refused where it cannot be read."""
        return SOURCES[self.kind].digests(self.location, columns)

    def rows(self, columns: Columns, digests: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The source's rows in its order, as a stream; Refused where they are not those that had these digests."""
        return SOURCES[self.kind].rows(self.location, columns, digests)


@dataclass(frozen=True)
class Source(StageBase):
    """Stage: a source → slices. One action in all; facts["slices"] names the slices in the source's order."""

    spec: SourceSpec
    how: SourceHow
    digests: tuple[str, ...]
    """`how.digests`, taken by whoever builds the graph, since `actions` reads nothing."""
    unread: str = ""
    """Why they were not taken; then it can be planned, and not run."""
    name = group = "source"
    needs = ()
    step = "in the list"

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        yield self.action(plain(self.spec), self.digests)

    def preview_bytes(self) -> int:
        """What cutting the source into slices reads."""
        return self.how.size()

    def run(self, action: Action, store: Store, out: Path) -> Record:
        names: list[str] = []
        states = {LISTED: 0, REPEATED: 0}
        seen: set[str] = set()
        for table in slices(self.how.rows(self.spec.columns, action.inputs), self.spec.rows_per_shard):
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
            raise Refused(f"source.{self.how.kind}: {self.how.location} has no rows; name one with at least one")
        return Record.of(action, out, states=states, facts={"slices": names})
