"""URL lists, Parquet, CSV, TSV and JSON lines, read as a stream: never more of them in memory than a few batches."""

from __future__ import annotations

import csv as lines
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.documents import digest_file
from infra.errors import Refused
from infra.records import SOURCE, pair_uid
from pipelines.source.columns import Columns
from pipelines.source.digest_cache import cached_digest, digest_of
from pipelines.source.files import Unreadable, find_files, location_name, open_location
from pipelines.source.list_errors import describe_error, never_closed

if TYPE_CHECKING:
    import pyarrow.csv as csv
    import pyarrow.dataset as ds

KEY = "source.urls"
FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "json"}
_BATCH_ROWS = 2048


def list_digests(urls: str) -> tuple[str, ...]:
    """SHA-256 (hex) of each list file, in reading order; Refused if there is none or one cannot be read."""
    base, found = find_files(urls, FORMATS, KEY)
    try:
        return tuple(digest_of(KEY, location_name(base), one, partial(_digest, base, one.name)) for one in found)
    except Unreadable as error:
        raise Refused(f"{KEY}: {urls} cannot be read: {error}") from error
    except OSError as error:
        raise Refused(f"{KEY}: {urls} cannot be read ({error.strerror or error})") from error


def _digest(base: str, name: str) -> str:
    if not base.startswith("s3://"):
        return digest_file(Path(base, name))
    total = hashlib.sha256()
    for chunk in open_location(base).chunks(name):
        total.update(chunk)
    return total.hexdigest()


def unhashed_bytes(urls: str) -> int:
    """Bytes of those list files whose digests are not remembered: what `list_digests` would read."""
    base, found = find_files(urls, FORMATS, KEY)
    return sum(one.bytes for one in found if cached_digest(KEY, location_name(base), one) is None)


def size(urls: str) -> int:
    """Bytes of all list files."""
    return sum(one.bytes for one in find_files(urls, FORMATS, KEY)[1])


def check_columns(urls: str, columns: Columns) -> None:
    """Refused, naming the columns that there are, unless every list file can be read and has those wanted."""
    with _files(urls) as paths:
        for path in paths:
            open_list(path, columns)


def rows(urls: str, columns: Columns, digests: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """`read` of the files of a list, a folder or a glob; Refused unless they are those that have these digests."""
    with _files(urls) as paths:
        if [digest_file(path) for path in paths] != list(digests):
            raise Refused(f"source.urls: {urls} changed while the run was under way; run again")
        yield from read(paths, columns)


@contextmanager
def _files(urls: str) -> Iterator[list[Path]]:
    """The list's files in reading order; those of S3 are copied, since a list, unlike an object, may change."""
    base, found = find_files(urls, FORMATS, KEY)
    if not urls.startswith("s3://"):
        yield [Path(base, one.name) for one in found]
        return
    bucket = open_location(base)
    with tempfile.TemporaryDirectory(prefix="unclip-list-") as folder:
        copies = []
        for number, one in enumerate(found):
            copies.append(Path(folder, f"{number:05d}-{Path(one.name).name}"))
            try:
                with open(copies[-1], "wb") as file:
                    file.writelines(bucket.chunks(one.name))
            except Unreadable as error:
                raise Refused(f"source.urls: {urls} cannot be read: {error}") from error
        yield copies


def read(paths: Sequence[Path], columns: Columns) -> Iterator[pa.RecordBatch]:
    """Batches with the columns of SOURCE and those to keep; a null URL or caption stays null.

    What is not UTF-8 becomes null, so that it costs its row (`no_caption`, `no_url`) and not the list.
    """
    kept: pa.Schema | None = None
    for path in paths:
        found = open_list(path, columns)
        schema = pa.schema([_plain(found.schema.field(name)) for name in columns.keep])
        if kept is not None and schema != kept:
            raise Refused(
                f"source.urls: {path.name} has other types in columns.keep than the files before it "
                f"({_types(schema)}, not {_types(kept)}); write all files of the list with one schema"
            )
        kept = schema
        count, before = 0, _stamp(path)
        last: tuple[str | None, str | None] = (None, None)
        try:
            for batch in stream(found, path, [columns.url, columns.caption, *columns.keep]):
                urls, captions = (_readable(batch.column(n).cast(pa.string())) for n in (columns.url, columns.caption))
                pairs = list(zip(urls.to_pylist(), captions.to_pylist(), strict=True))
                names = pa.array(
                    [pair_uid(url or "", caption or "") for url, caption in pairs], SOURCE.field("uid").type
                )
                extra = [_readable(batch.column(field.name).cast(field.type)) for field in kept]
                count, last = count + batch.num_rows, (pairs or [last])[-1]
                yield pa.record_batch([names, urls, captions, *extra], schema=pa.schema([*SOURCE, *kept]))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            behind = f", behind row {count:,}" if count else ""
            raise Refused(
                f"source.urls: {path.name} cannot be read to its end{behind}: {describe_error(path, error)}"
            ) from error
        if path.suffix in (".csv", ".tsv") and any(never_closed(path, value) for value in last):
            raise Refused(
                f"source.urls: {path.name} opens a quote in row {count:,} that nothing closes, so that the rest of the "
                "file would be one value; close it"
            )
        if _stamp(path) != before:
            raise Refused(f"source.urls: {path.name} changed while the run was under way; run again")


def open_list(path: Path, columns: Columns, key: str = "source.urls") -> ds.Dataset:
    """A list file as a dataset; Refused unless it can be read and has the columns, URL and caption as text.

    key: the recipe's, whose file it is; of another than a list's, the URL's column has its name from unclip.
    """
    import pyarrow.csv as csv
    import pyarrow.dataset as ds

    kind: Any = FORMATS[path.suffix]
    try:
        if kind in ("csv", "tsv"):
            delimiter = "\t" if kind == "tsv" else ","
            as_text = {name: pa.string() for name in (columns.url, columns.caption)}
            kind = ds.CsvFileFormat(
                parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                read_options=_header(path, columns, delimiter),
                # check_utf8: one row would stand for all; `read` looks at each
                convert_options=csv.ConvertOptions(column_types=as_text, check_utf8=False),
            )
        found = ds.dataset(path, format=kind)
    except (pa.ArrowException, OSError) as error:
        raise Refused(
            f"{key}: {path.name} cannot be read as {path.suffix[1:]}: {describe_error(path, error)}"
        ) from error
    there = found.schema.names
    url = "source.columns.url" if key == "source.urls" else key
    texts = ((url, columns.url), ("source.columns.caption", columns.caption))
    for field, name in [*texts, *(("source.columns.keep", name) for name in columns.keep)]:
        if name not in there:
            shown = ", ".join(one if one == one.strip() else repr(one) for one in there)
            raise Refused(f"{field}: {path.name} has no column {name!r}. Its columns: {shown or 'none'}.")
    for field, name in texts:
        kind = _plain(found.schema.field(name)).type
        if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
            raise Refused(f"{field}: column {name!r} of {path.name} holds {kind}, not text; name another")
    return found


def stream(found: ds.Dataset, path: Path, names: list[str]) -> Iterator[pa.RecordBatch]:
    """The columns of a list file, a batch at a time. Memory does not grow with the file, nor with its row groups."""
    if path.suffix == ".parquet":  # a dataset would read a row group, often the whole file, before its first batch
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            yield from file.iter_batches(_BATCH_ROWS, columns=names, use_threads=False)
    else:
        yield from found.to_batches(names, batch_size=_BATCH_ROWS, batch_readahead=2, fragment_readahead=1)


def _readable(column: pa.Array) -> pa.Array:
    """The column with null in place of text that is not UTF-8."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        binary = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
        return pa.array([_decoded(value) for value in column.view(binary).to_pylist()], column.type)
    return column


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def _header(path: Path, columns: Columns, delimiter: str) -> csv.ReadOptions:
    """The names come from the file's first line, unless the recipe says them and this line does not."""
    import pyarrow.csv as csv

    if not columns.header:
        return csv.ReadOptions()
    with open(path, "rb") as file:
        first = file.readline(1 << 16).decode("utf-8-sig", "replace").strip("\r\n")
    named = next(lines.reader([first], delimiter=delimiter), [])
    return csv.ReadOptions(column_names=columns.header, skip_rows=int(tuple(named) == columns.header))


def _plain(field: pa.Field) -> pa.Field:
    """The field without metadata, and without a dictionary, whose order would depend on the file."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    return pa.field(field.name, kind)


def _types(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes with a file, as far as its folder tells."""
    status: os.stat_result = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
