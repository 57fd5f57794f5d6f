"""A folder of pictures → samples: captions in .txt files beside them, or in a metadata file with file_name.

With `metadata.csv`, `.jsonl` or `.parquet` directly in the folder, as Hugging Face's ImageFolder has it, its rows are
the samples, and files that it does not name are none. Without, every picture is one, however deep it lies.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa

from infra.concurrent import map_ordered
from infra.documents import canonical, digest, digest_file
from infra.errors import Refused
from pipelines.source.columns import Columns
from pipelines.source.digest_cache import cached_digest, digest_of
from pipelines.source.files import Location, SourceFile, Unreadable, is_text, location_name, open_location
from pipelines.source.list_errors import describe_error
from pipelines.source.lists import FORMATS, open_list, stream
from pipelines.source.samples import PICTURES, TEXT_BYTES, Sample, batches, caption_of, sha256_of, text_of

KEY = "source.folder"
THREADS = 8
"""Pictures read at a time: on S3, reading one is mostly waiting."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class _Digest:
    """Over what a folder's samples are: each one's name, picture, caption and what is wrong with it."""

    total: Any = field(default_factory=hashlib.sha256)

    def watch(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            sha = sample.sha256.hex() if sample.sha256 else None
            self.total.update(canonical([sample.name, sha, sample.caption, sample.wrong]) + b"\n")
            yield sample


def folder_digest(folder: str, columns: Columns) -> tuple[str]:
    """One digest over the folder's samples, and over its metadata file if it has one. Reads every picture, unless no
    file has changed since that was last done."""

    def read() -> str:
        total = _Digest()
        for _ in _samples(folder, columns, total):
            pass
        return total.total.hexdigest()

    return (digest_of(_kind(columns), location_name(folder), _whole(folder), read),)


def unhashed_bytes(folder: str, columns: Columns) -> int:
    """Bytes that `folder_digest` would read."""
    whole = _whole(folder)
    return 0 if cached_digest(_kind(columns), location_name(folder), whole) else whole.bytes


def size(folder: str) -> int:
    """Bytes of all its files."""
    return _whole(folder).bytes


def _kind(columns: Columns) -> str:
    """What is remembered depends on what is read of a folder's metadata."""
    return f"{KEY} {digest(canonical(asdict(columns)))}"


def _whole(folder: str) -> SourceFile:
    """All files of a folder as one, which changes whenever one of them does."""
    try:
        total, size, newest = hashlib.sha256(), 0, 0.0
        for one in open_location(folder).list():
            total.update(canonical([one.name, one.bytes, one.stamp]))
            size, newest = size + one.bytes, max(newest, one.modified)
    except Refused as error:
        raise Refused(f"{KEY}: {error}") from error
    except OSError as error:
        raise Refused(f"{KEY}: {folder} cannot be read: {error}") from error
    return SourceFile("", size, stamp=total.hexdigest(), modified=newest)


def rows(folder: str, columns: Columns, digests: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Batches of the folder's samples; Refused, at their end, unless they are those that have this digest."""
    total = _Digest()
    yield from batches(_samples(folder, columns, total), columns.keep, KEY)
    if (total.total.hexdigest(),) != tuple(digests):
        raise Refused(f"{KEY}: {folder} changed while the run was under way; run again")


def _samples(folder: str, columns: Columns, total: _Digest) -> Iterator[Sample]:
    try:
        there = open_location(folder)
    except Refused as error:
        raise Refused(f"{KEY}: {error}") from error
    try:
        with _metadata(there) as path:
            if path is not None:
                total.total.update(digest_file(path).encode())
            found = _walk(there) if path is None else _listed(there, path, columns)
            yield from total.watch(found)
    except OSError as error:
        raise Refused(f"{KEY}: {folder} cannot be read: {error}") from error


@contextmanager
def _metadata(there: Location) -> Iterator[Path | None]:
    """A copy of the folder's metadata file, or None; Refused if there are several."""
    with tempfile.TemporaryDirectory(prefix="unclip-metadata-") as scratch:
        copies = []
        for ending in FORMATS:
            try:
                source = there.open(f"metadata{ending}")
            except Unreadable:
                continue
            copies.append(Path(scratch, f"metadata{ending}"))
            with source, open(copies[-1], "wb") as file:
                shutil.copyfileobj(source, file)
        if len(copies) > 1:
            raise Refused(f"{KEY}: there are {' and '.join(copy.name for copy in copies)}; leave one of them")
        yield copies[0] if copies else None


def _walk(there: Location) -> Iterator[Sample]:
    """Every picture, with the text of the .txt file of its name."""
    pictures = (found.name for found in there.list() if _is_picture(found.name))
    yield from map_ordered(lambda name: _beside(there, name), pictures, THREADS)


def _is_picture(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower()[1:] in PICTURES and not path.name.startswith(".")


def _beside(there: Location, name: str) -> Sample:
    sample = _picture(there, name)
    if sample.wrong:
        return sample
    try:
        caption, wrong = caption_of(there.get(str(PurePosixPath(name).with_suffix(".txt")), 0, TEXT_BYTES + 1))
    except Unreadable as error:
        # No text is nothing wrong yet: a row without a caption has a state of its own.
        caption, wrong = None, None if error.state == "no_file" else "bad_caption"
    return replace(sample, caption=caption, wrong=wrong)


def _picture(there: Location, name: str) -> Sample:
    shown = name.encode(errors="replace").decode()
    try:
        sha, length = sha256_of(there.chunks(name))
    except Unreadable as error:
        return Sample(shown, shown, wrong=error.state)
    return Sample(name, name, 0, length, sha)


def _listed(there: Location, path: Path, columns: Columns) -> Iterator[Sample]:
    """A sample a row of the metadata file, in its order."""
    names = Columns("file_name", columns.caption, columns.keep)
    table = open_list(path, names, KEY)

    def sample(row: dict[str, Any]) -> Sample:
        name = row["file_name"]
        found = _picture(there, name) if name else Sample("", "", wrong="no_image")
        caption, wrong = text_of(row[columns.caption])
        facts = {name: row[name] for name in columns.keep}
        if not all(is_text(value) for value in facts.values() if isinstance(value, str)):
            wrong, facts = wrong or "bad_metadata", {}
        return replace(found, caption=caption, wrong=found.wrong or wrong, facts=facts)

    def lines() -> Iterator[dict[str, Any]]:
        for batch in stream(table, path, [names.url, names.caption, *names.keep]):
            yield from batch.to_pylist()

    try:
        yield from map_ordered(sample, lines(), THREADS)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise Refused(f"{KEY}: {path.name} cannot be read to its end: {describe_error(path, error)}") from error
