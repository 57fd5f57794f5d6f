"""Where everything lies: named bytes that are written once, in a folder or in S3.

There is one write, `put_new`: the first to put a name wins, for ever. Records, manifests, checkpoints, ledger entries
and leases are numbered or named by digest, so nothing needs to be overwritten, and two runs on one store are safe.
`s3.py` is the other implementation. A store is picklable and small: it travels to Ray workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from infra.errors import Refused

# Folders of a local store that hold no named bytes: files being written, MLflow's database, copies for people.
RESERVED = ("tmp", "mlflow", "view")
RENEW_S = 3600
"""Bytes put again are dated anew once they are so many seconds old: much less than what gc spares."""


@dataclass(frozen=True)
class Entry:
    """One name of a listing: its size in bytes, and when it was put, by the store's clock (UTC)."""

    name: str
    bytes: int
    modified: datetime


class Store(Protocol):
    """Named bytes, written once. Names are relative, with "/" between parts; a missing name raises NotFound."""

    @property
    def uri(self) -> str:
        """What `open_store` takes to open it again."""
        ...

    @property
    def distant(self) -> bool:
        """Whether what it holds has to be fetched, and `local` and `part` keep copies."""
        ...

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """The bytes [start, start + length) of a name; all to its end when length is None."""
        ...

    def part(self, name: str, start: int, length: int, within: tuple[int, int] | None = None) -> bytes:
        """The same bytes of what is read again and again in parts, of which a store that is elsewhere keeps copies.

        within: (start, length) of the range that is fetched and kept, if this one lies in a larger one.
        """
        ...

    def put_new(self, name: str, data: bytes | Path) -> bool:
        """Puts bytes, or a file's bytes, under a name that has none yet.

        True also if these very bytes lie there already, False if others do: the first to put wins. A file made in
        `scratch()` may be taken as it is, without a copy, and must not be written to afterwards. Bytes that lie there
        already are dated anew (at the latest once they are `RENEW_S` old), since whoever put them means to use them.
        """
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """Every name that starts with prefix, sorted."""
        ...

    def local(self, name: str) -> Path:
        """A file with a name's bytes, to be read only: the store's own, or a cached copy."""
        ...

    def exists(self, name: str) -> bool:
        """Whether something lies under that name."""
        ...

    def delete(self, name: str) -> None:
        """Removes a name, for gc and forget only. No error if there is none."""
        ...

    def scratch(self) -> AbstractContextManager[Path]:
        """A new empty folder for files on their way into the store; it goes when the context ends."""
        ...


def check_name(name: str) -> str:
    """The name itself; Refused unless it is relative, made of parts that are no "." or "..", and outside RESERVED."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in name or not name.isprintable():
        raise Refused(f"{name!r} is no name for a store: parts between single slashes, none of them . or ..")
    if parts[0] in RESERVED:
        raise Refused(f"{name!r} is no name for a store: {parts[0]}/ is reserved")
    return name
