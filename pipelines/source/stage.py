"""What a run is made from → slices: a URL list, tars that exist already, or a folder of pictures.

A slice is what one shard of every later data stage is made from (slices.py says where one ends). A list's rows are
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
from pipelines.source import folders, lists, tars
from pipelines.source.columns import Columns
from pipelines.source.cut import slices, unique
from pipelines.source.files import find
from pipelines.source.lists import check_columns, list_digests
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

    def __post_init__(self) -> None:
        said = [name for name in ("urls", "tars", "folder") if getattr(self, name)]
        if len(said) > 1:
            raise Refused(f"source: {' and '.join(said)} are given; a run has one source, leave one of them")
        if not said:
            raise Refused("source.urls is missing: name a list of URLs, or source.tars, or source.folder")

    @property
    def samples(self) -> str | None:
        """Where the pictures of tars or a folder lie, absolute: what the file names in their slices are relative to."""
        where = find(self.tars, (".tar",), tars.KEY)[0] if self.tars else self.folder
        if where is None or where.startswith("s3://"):
            return where
        return str(Path(where).expanduser().absolute())  # a worker has another working directory

    def unread(self, columns: Columns) -> int:
        """Bytes that `digests` would read, since they are new or have changed. Refused where they cannot be found."""
        if self.tars:
            return tars.unread(self.tars)
        if self.folder:
            return folders.unread(self.folder, columns)
        assert self.urls
        return lists.unread(self.urls)

    def size(self) -> int:
        """How large it is. Refused where it cannot be found."""
        if self.tars:
            return tars.size(self.tars)
        if self.folder:
            return folders.size(self.folder)
        assert self.urls
        return lists.size(self.urls)

    def digests(self, columns: Columns) -> tuple[str, ...]:
        """What the source holds, as the inputs of its action: reads what is not remembered of it (remembered.py).
        Refused where it cannot be read."""
        if self.tars:
            return tars.tar_digests(self.tars)
        if self.folder:
            return folders.folder_digest(self.folder, columns)
        assert self.urls
        if not self.urls.startswith("s3://") or lists.unread(self.urls):
            check_columns(self.urls, columns)
        return list_digests(self.urls)

    def rows(self, columns: Columns, digests: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The source's rows in its order, as a stream; Refused where they are not those that had these digests."""
        if self.tars:
            return tars.rows(self.tars, columns, digests)
        if self.folder:
            return folders.rows(self.folder, columns, digests)
        assert self.urls
        return lists.rows(self.urls, columns, digests)


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
            what = "tars" if self.how.tars else "folder" if self.how.folder else "urls"
            raise Refused(f"source.{what}: {getattr(self.how, what)} has no rows; name one with at least one")
        return Record.of(action, out, states=states, facts={"slices": names})
