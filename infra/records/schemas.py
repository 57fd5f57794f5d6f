"""Columns of every kind of shard, in one place: what is written by one stage is read by another.

uid is 16 bytes: the first half of SHA-256 over URL, NUL, caption; of a sample that comes with its picture, over the
picture's SHA-256 and the caption. Every row ends in exactly one state.
"""

from __future__ import annotations

import hashlib

import pyarrow as pa

LISTED = "listed"
"""State of a row that is in a slice: its final state is decided by the stages behind."""
KEPT = "kept"
"""State of a row that a stage passed on."""
UID = pa.binary(16)

# A slice of the URL list. Columns named in `columns.keep` follow.
SOURCE = pa.schema([("uid", UID), ("url", pa.string()), ("caption", pa.string())])

# The last column of a slice of tars or of a folder: where the picture's bytes lie, and why it cannot be had at all.
MEMBER = pa.field(
    "member",
    pa.struct([("file", pa.string()), ("start", pa.int64()), ("bytes", pa.int64()), ("wrong", pa.string())]),
)

# index.parquet of a download shard: every row of the slice, kept or not. offset and length place the picture's bytes
# inside images.tar (null unless kept); width and height are those of the original; sha256 is of the original bytes.
INDEX = pa.schema(
    [
        ("uid", UID),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("state", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.binary(32)),
    ]
)

# selection: one row for each kept row of the shard that it is of, in that order; rule is null where the row stays.
SELECTION = pa.schema([("uid", UID), ("rule", pa.string())])


def embedded_schema(width: int) -> pa.Schema:
    """rows.parquet of an embed shard: all that a trainer needs. Embeddings are raw (not normalised) float32 [width]."""
    vector = pa.list_(pa.float32(), width)
    return pa.schema(
        [
            ("uid", UID),
            ("caption", pa.string()),
            ("image_embedding", vector),
            ("text_embedding", vector),
            ("score", pa.float32()),
            ("image", pa.binary()),
            ("url", pa.string()),
        ]
    )


def pair_uid(url: str, caption: str) -> bytes:
    """The name of a row: the first 16 bytes of SHA-256 over URL, NUL, caption."""
    return hashlib.sha256(url.encode() + b"\0" + caption.encode()).digest()[:16]


def sample_uid(picture_sha256: bytes, caption: str) -> bytes:
    """The name of a sample that comes with its picture: the first 16 bytes of SHA-256 over the SHA-256 of the picture's
    bytes and the caption. The inner digest has one length, so no two samples are written alike."""
    return hashlib.sha256(picture_sha256 + caption.encode()).digest()[:16]
