"""Digests of source files that were read before, so that a source of terabytes is read when it changes, and not daily.

A digest is remembered by kind, place, name, size and stamp of its file (locally the times of writing and of any change,
and the inode; in S3 when it was put). It lies in a database in the user's cache; where that cannot be had, everything
is read again. What was written within the last minute is not remembered, since it could change again without a trace.
Nothing rests on it but the question whether there is something to do: whoever reads a source's rows checks its digests.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from pipelines.source.files import SourceFile

YOUNG_S = 60


def cached_digest(kind: str, place: str, file: SourceFile) -> str | None:
    """The digest of a file as it was when it was last read, if it has not changed since."""
    if not _path().is_file():
        return None
    try:
        with closing(_database()) as database:
            row = database.execute(
                "select digest from digests where kind = ? and place = ? and name = ? and bytes = ? and stamp = ?",
                (kind, place, file.name, file.bytes, file.stamp),
            ).fetchone()
    except (OSError, sqlite3.Error):
        return None
    return row[0] if row else None


def digest_of(kind: str, place: str, file: SourceFile, read: Callable[[], str]) -> str:
    """The digest of a file: what is remembered of it, or else what `read` makes of its bytes, from now on remembered.

    place: where the file's name begins, such that the same place and name are the same file to whoever asks again.
    """
    known = cached_digest(kind, place, file)
    if known is not None:
        return known
    made = read()
    if file.stamp and file.modified < time.time() - YOUNG_S:
        try:
            with closing(_database()) as database, database:
                database.execute(
                    "insert or replace into digests values (?, ?, ?, ?, ?, ?)",
                    (kind, place, file.name, file.bytes, file.stamp, made),
                )
        except (OSError, sqlite3.Error):
            pass  # a cache that cannot be written is none
    return made


def _path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unclip" / "digests.db"


def _database() -> sqlite3.Connection:
    _path().parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(_path(), timeout=10)
    database.execute(
        "create table if not exists digests (kind text, place text, name text, bytes integer, stamp text, digest text, "
        "primary key (kind, place, name))"
    )
    return database
