"""Samples that come with their pictures, from tars and folders, as rows of a slice.

Nothing is copied: a row says in which file of the source its picture's bytes lie, and is named by what it holds, so
that the same picture and caption have one uid in a folder, in a tar, and in another tar.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa

from infra.errors import Refused
from infra.records import MEMBER, SOURCE, pair_uid, sample_uid
from pipelines.source.files import is_text

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
"""Endings of pictures; what they really are is judged by their bytes."""
TEXT_BYTES = 1 << 20
"""Longer captions and metadata files are not read."""
_BATCH = 1024


@dataclass(frozen=True)
class Sample:
    """One picture with its caption, or what is wrong with it."""

    name: str
    """Where a person finds it in the source: "cats/1.jpg", "00012.tar/000123.jpg"."""
    file: str
    """The source's file that holds the picture, by its name there."""
    start: int = 0
    """Where in that file the picture's bytes begin."""
    length: int = 0
    """How many they are."""
    sha256: bytes | None = None
    """SHA-256 of these bytes; None where there are none."""
    caption: str | None = None
    wrong: str | None = None
    """The state that the row ends in, where it is clear already: no_image, bad_caption, …"""
    url: str | None = None
    """The picture's address on the web, where the sample says it."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Column → value of what is carried along."""

    @property
    def uid(self) -> bytes:
        """By content; what has no picture is named by its place, so that two of them are not taken for one."""
        caption = self.caption or ""
        return pair_uid(self.name, caption) if self.sha256 is None else sample_uid(self.sha256, caption)


def batches(samples: Iterable[Sample], keep: tuple[str, ...], key: str) -> Iterator[pa.RecordBatch]:
    """Batches with the columns of SOURCE, those to keep, and MEMBER.

    The first batch decides the type of each kept column, as the first block of a CSV file does; Refused, naming the
    source's `key`, where a later value does not fit.
    """
    if MEMBER.name in keep:
        raise Refused(f"source.columns.keep names {MEMBER.name}, unclip's own column; leave out or rename")
    stream, kept = iter(samples), pa.schema([])
    while batch := list(islice(stream, _BATCH)):
        columns: list[Any] = [
            pa.array([sample.uid for sample in batch], SOURCE.field("uid").type),
            pa.array([sample.url or sample.name for sample in batch], pa.string()),
            pa.array([sample.caption for sample in batch], pa.string()),
        ]
        for name in keep:
            known = kept.field(name).type if name in kept.names else None
            try:
                values = pa.array([sample.facts.get(name) for sample in batch], known)
            except (pa.ArrowException, TypeError, OverflowError) as error:
                raise Refused(
                    f"{key}: the samples from {batch[0].name} to {batch[-1].name} have no one type in {name!r} "
                    f"({' '.join(str(error).split())[:150]}); leave it out of source.columns.keep"
                ) from error
            if known is None:
                kind = pa.string() if pa.types.is_null(values.type) else values.type
                values, kept = values.cast(kind), kept.append(pa.field(name, kind))
            columns.append(values)
        members = [(sample.file, sample.start, sample.length, sample.wrong) for sample in batch]
        columns.append(pa.array([dict(zip(MEMBER.type.names, one, strict=True)) for one in members], MEMBER.type))
        yield pa.record_batch(columns, schema=pa.schema([*SOURCE, *kept, MEMBER]))


def caption_of(data: bytes) -> tuple[str | None, str | None]:
    """(caption, None) of a .txt file's bytes without the white space around it, or (None, what is wrong)."""
    if len(data) > TEXT_BYTES:
        return None, "bad_caption"
    try:
        return data.decode("utf-8-sig").strip(), None
    except UnicodeDecodeError:
        return None, "bad_caption"


def text_of(value: Any) -> tuple[str | None, str | None]:
    """(text, None) of a caption out of metadata, or (None, what is wrong); no text at all is nothing wrong yet."""
    if not isinstance(value, str):
        return None, None
    return (value.strip(), None) if is_text(value) else (None, "bad_caption")


def sha256_of(chunks: Iterable[bytes]) -> tuple[bytes, int]:
    """(SHA-256, how many) of bytes that come in pieces."""
    total, length = hashlib.sha256(), 0
    for chunk in chunks:
        total.update(chunk)
        length += len(chunk)
    return total.digest(), length
