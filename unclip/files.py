"""Documents of a folder that a stranger may have written: only regular files of a bounded size are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 64 << 20
"""Larger ones are no configuration and no table of merges; the largest that is in use has a few megabytes."""


def read_text(path: Path) -> str:
    """A file's UTF-8 text; raises OSError unless it is a regular file (a pipe never ends), ValueError for its content.

    A link is followed: the folder of a stored release consists of links.
    """
    if path.exists() and not path.is_file():
        raise OSError("it is no regular file")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    return path.read_text(encoding="utf-8")


def read_document(path: Path) -> Any:
    """What a JSON file says; raises OSError and ValueError as `read_text` does."""
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
