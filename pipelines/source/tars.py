"""Webdataset tars that exist already → samples. A tar is read once from its beginning to its end; nothing is unpacked.

A sample is what follows on each other under one key, the name up to the first dot behind the last slash, as webdataset
has it: key.jpg, key.txt, key.json. Members are never opened by their names, so that no name leads anywhere.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from infra.documents import canonical, digest
from infra.errors import Refused
from pipelines.source.columns import Columns
from pipelines.source.digest_cache import cached_digest, digest_of
from pipelines.source.files import (
    CHUNK,
    Location,
    SourceFile,
    Unreadable,
    find_files,
    is_text,
    location_name,
    open_location,
    parts,
)
from pipelines.source.samples import PICTURES, TEXT_BYTES, Sample, batches, caption_of, sha256_of, text_of

KEY = "source.tars"
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_LONGEST = 1 << 20


def tar_digests(tars: str) -> tuple[str, ...]:
    """A digest over each tar's name and bytes, in the order of their names; Refused where one cannot be read.

    The name counts, since slices say in which tar their pictures lie; the folder that they lie in does not.
    """
    base, found = find_files(tars, (".tar",), KEY)
    there = open_location(base)

    def digest_of_tar(one: SourceFile) -> str:
        return digest_of(KEY, location_name(base), one, lambda: _digest(there, one.name))

    return tuple(digest_of_tar(one) for one in found)


def unhashed_bytes(tars: str) -> int:
    """Bytes of those tars whose digests are not remembered: what `tar_digests` would read."""
    base, found = find_files(tars, (".tar",), KEY)
    return sum(one.bytes for one in found if cached_digest(KEY, location_name(base), one) is None)


def size(tars: str) -> int:
    """Bytes of all of them."""
    return sum(one.bytes for one in find_files(tars, (".tar",), KEY)[1])


def rows(tars: str, columns: Columns, digests: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Batches of the samples of all tars; Refused unless they are those that have these digests."""
    base, found = find_files(tars, (".tar",), KEY)

    def samples() -> Iterator[Sample]:
        there = open_location(base)
        for one, known in zip(found, digests, strict=False):
            with _open(there, one.name) as file:
                if _named(one.name, file) != known:
                    raise Refused(f"{KEY}: {one.name} changed while the run was under way; run again")
                yield from read(file, one.name, columns)

    if len(found) != len(digests):
        raise Refused(f"{KEY}: {tars} changed while the run was under way; run again")
    yield from batches(samples(), columns.keep, KEY)


def _open(there: Location, name: str) -> BinaryIO:
    try:
        return there.open(name)
    except Unreadable as error:
        raise Refused(f"{KEY}: {error}; links are not followed: name the tars where they lie") from None
    except OSError as error:
        raise Refused(f"{KEY}: {name} cannot be read ({error.strerror or error})") from error


def _digest(there: Location, name: str) -> str:
    with _open(there, name) as file:
        return _named(name, file)


def _named(name: str, file: BinaryIO) -> str:
    """The digest of a tar under its name. Leaves the file at its end."""
    sha, _ = sha256_of(iter(lambda: file.read(CHUNK), b""))
    return digest(canonical([name, sha.hex()]))


@dataclass
class _Group:
    """What has been read of one sample."""

    key: str
    seen: set[str] = field(default_factory=set)
    picture: Sample | None = None
    caption: tuple[str | None, str | None] = (None, None)
    metadata: dict[str, Any] = field(default_factory=dict)
    wrong: str | None = None
    """The first thing that is."""

    def blame(self, state: str | None) -> None:
        self.wrong = self.wrong or state


def read(file: BinaryIO, name: str, columns: Columns) -> Iterator[Sample]:
    """The samples of one tar, in its order, each of them once; Refused where it is no whole tar, at its end at last.

    What keeps a sample from being taken is in `wrong`: no_image, two_images, duplicate_key (two members of one name),
    bad_name (it leads out of where it lies), not_a_file (a link, a device, a sparse file), bad_caption (not UTF-8, or
    longer than TEXT_BYTES), bad_metadata (no JSON object, or longer).
    """
    group: _Group | None = None
    for member in _members(file, name):
        member.name = member.name.removeprefix("./")  # as `tar cf x.tar .` writes it
        split = _NAME.fullmatch(member.name)
        if member.isdir() or split is None:
            continue  # as webdataset does
        key, ending = split[1], split[2].lower()
        if group is None or key != group.key:
            if group is not None and group.seen & {*PICTURES, "txt", "json"}:
                yield _sample(group, name, columns)
            group = _Group(key)
        _add(group, member, ending, file, name)
    if group is not None and group.seen & {*PICTURES, "txt", "json"}:
        yield _sample(group, name, columns)


def _add(group: _Group, member: tarfile.TarInfo, ending: str, file: BinaryIO, tar: str) -> None:
    if ending in group.seen:
        group.blame("duplicate_key")
        return
    group.seen.add(ending)
    if ending not in (*PICTURES, "txt", "json"):
        return
    try:
        parts(member.name)
    except Unreadable as error:
        group.blame(error.state)
        return
    if not member.isreg() or member.issparse():
        group.blame("not_a_file")
    elif ending in PICTURES:
        if group.picture is not None:
            group.blame("two_images")
            return
        sha, length = sha256_of(_bytes(file, member))
        if length != member.size:
            raise _cut(tar)
        group.picture = Sample(f"{tar}/{member.name}", tar, member.offset_data, length, sha)
    else:
        data = b"".join(_bytes(file, member)) if member.size <= TEXT_BYTES else b" " * (TEXT_BYTES + 1)
        if ending == "txt":
            group.caption = caption_of(data)
        else:
            group.metadata, wrong = _metadata(data)
            group.blame(wrong)


def _metadata(data: bytes) -> tuple[dict[str, Any], str | None]:
    try:
        value = json.loads(data) if len(data) <= TEXT_BYTES else None
    except (ValueError, RecursionError):
        value = None
    return (value, None) if isinstance(value, dict) else ({}, "bad_metadata")


def _sample(group: _Group, tar: str, columns: Columns) -> Sample:
    """A .txt says the caption before the JSON does."""
    caption, wrong = group.caption if "txt" in group.seen else text_of(group.metadata.get(columns.caption))
    group.blame(wrong)
    if group.picture is None:
        group.blame("no_image")
    facts = {name: group.metadata.get(name) for name in columns.keep}
    if not all(is_text(value) for value in facts.values() if isinstance(value, str)):
        group.blame("bad_metadata")
        facts = {}
    url = group.metadata.get(columns.url)
    found = group.picture or Sample(f"{tar}/{group.key.encode(errors='replace').decode()}", tar)
    return Sample(
        name=found.name,
        file=tar,
        start=found.start,
        length=found.length,
        sha256=found.sha256,
        caption=caption,
        wrong=group.wrong,
        url=url if isinstance(url, str) and is_text(url) else None,
        facts=facts,
    )


class _Headers:
    """A tar's file as tarfile reads it, for headers alone: it takes a name's length from the file at its word."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LONGEST:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.file.read(size)


def _members(file: BinaryIO, name: str) -> Iterator[tarfile.TarInfo]:
    """Every member of an uncompressed tar; Refused where it does not end as a tar does."""
    file.seek(0)
    try:
        with tarfile.open(fileobj=cast(Any, _Headers(file)), mode="r:") as tar:
            while (member := tar.next()) is not None:
                cast(Any, tar).members.clear()  # it would remember all of them
                yield member
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise Refused(
            f"{KEY}: {Path(name).name} cannot be read to its end: {error}. Is it an uncompressed tar?"
        ) from error
    # tarfile takes a header that it cannot read, or none at all, for the end.
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise _cut(name)


def _bytes(file: BinaryIO, member: tarfile.TarInfo) -> Iterator[bytes]:
    file.seek(member.offset_data)
    left = member.size
    while left and (chunk := file.read(min(left, CHUNK))):
        yield chunk
        left -= len(chunk)


def _cut(name: str) -> Refused:
    return Refused(
        f"{KEY}: {name} is cut off or damaged: it does not end as a tar does. Get it again, or leave it out."
    )
