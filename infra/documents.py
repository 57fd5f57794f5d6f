"""Stored JSON: one text for equal documents, its digest, and the version of its schema."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from infra.errors import Refused

SCHEMA_VERSION = 1


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical(document: Any) -> bytes:
    """The one JSON text of a document: sorted keys, no spaces, UTF-8, no NaN. Equal documents give equal bytes."""
    return _CANONICAL.encode(document).encode()


def digest(data: bytes) -> str:
    """SHA-256 of bytes, in hex (64 characters)."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex, read in bounded memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_schema(document: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the document; raises Refused where its `schema_version` is not the one that this release reads."""
    found = document.get("schema_version")
    if found != SCHEMA_VERSION:
        raise Refused(
            f"{where} has schema version {found!r}, and this unclip reads version {SCHEMA_VERSION}. "
            "Use the unclip that wrote it, or a new store."
        )
    return document
