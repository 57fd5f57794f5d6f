"""The kinds of source: how each is found, how its contents are named, and how its rows are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipelines.source import folders, lists, tars
from pipelines.source.columns import Columns
from pipelines.source.files import find_files


@dataclass(frozen=True)
class SourceKind:
    """One kind of source. `location` is what the recipe says of it: a path, or an address of the kind's own.

    All raise Refused where the location cannot be read.
    """

    size: Callable[[str], int]
    """location → bytes that reading its rows reads."""
    unread: Callable[[str, Columns], int]
    """location, columns → bytes that `digests` would read, since they are new or have changed."""
    digests: Callable[[str, Columns], tuple[str, ...]]
    """location, columns → what it holds, as SHA-256s (hex) in its order: the inputs of the source's action."""
    rows: Callable[[str, Columns, Sequence[str]], Iterator[pa.RecordBatch]]
    """location, columns, digests → its rows in order, with the columns of `infra.records.SOURCE` and those to keep;
    Refused where they are not those that had these digests. Where there are `pictures`, a row has MEMBER too."""
    pictures: Callable[[str], str] | None = None
    """location → where its pictures lie, which `gather` takes; None: rows have URLs, which `download` fetches."""


def _list_digests(urls: str, columns: Columns) -> tuple[str, ...]:
    if not urls.startswith("s3://") or lists.unhashed_bytes(urls):
        lists.check_columns(urls, columns)
    return lists.list_digests(urls)


SOURCES: dict[str, SourceKind] = {
    "urls": SourceKind(lists.size, lambda urls, _: lists.unhashed_bytes(urls), _list_digests, lists.rows),
    "tars": SourceKind(
        tars.size,
        lambda location, _: tars.unhashed_bytes(location),
        lambda location, _: tars.tar_digests(location),
        tars.rows,
        lambda location: find_files(location, (".tar",), tars.KEY)[0],
    ),
    "folder": SourceKind(
        folders.size, folders.unhashed_bytes, folders.folder_digest, folders.rows, lambda folder: folder
    ),
}
"""Every kind, by the recipe's key; those that plug-ins add are `source.uri: kind://location`."""
