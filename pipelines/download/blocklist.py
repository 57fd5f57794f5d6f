"""What is never asked: hosts, and patterns of URLs; from a recipe or from a file."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from infra.documents import canonical, digest
from infra.errors import Refused
from pipelines.source import Unreadable, open_location

_COMMENT = re.compile(r"(^|\s)#.*")


class Blocklist:
    """Entries without a slash are hosts, each with all hosts below it; entries with one are globs (`*`, `?`, `[…]`)
    over the whole URL as it is asked, `https://host/path?query`, letters of either case.

    Raises Refused for an entry that can be neither.
    """

    def __init__(self, entries: Iterable[str] = ()) -> None:
        hosts, globs = set[str](), list[str]()
        for entry in entries:
            if wrong := fault(entry):
                raise Refused(f"download.block has {entry!r}{wrong}")
            if "/" in entry:
                globs.append(fnmatch.translate(entry))
            else:
                hosts.add(_ascii(entry.strip(".")))
        self._hosts = frozenset(hosts)
        self._globs = re.compile("|".join(globs), re.IGNORECASE) if globs else None

    def blocks(self, host: str, url: str) -> bool:
        """Whether a URL on that host (in ASCII, lower case) is not to be asked."""
        labels = host.rstrip(".").split(".")
        if self._hosts and any(".".join(labels[first:]) in self._hosts for first in range(len(labels))):
            return True
        return bool(self._globs and self._globs.match(url))


@lru_cache(maxsize=1)
def blocklist(said: tuple[str, ...], filed: tuple[str, ...]) -> Blocklist:
    """The block list of a recipe and its file, made once a process."""
    return Blocklist((*said, *filed))


def fault(entry: str) -> str:
    """What is wrong with an entry, as the end of a sentence that names it; "" where nothing is."""
    if not entry.strip() or entry != entry.strip():
        return "; write a host, or a pattern of URLs such as */ads/*"
    if "/" in entry:
        return ""
    if re.search(r"[*?\[\s:]", entry):
        return ": a host stands for all below it, without * or port; a pattern of URLs has a slash, such as http*://*/ads/*"
    try:
        _ascii(entry.strip("."))
    except UnicodeError as error:
        return f", which is no host name: {error}"
    return ""


def read_file(uri: str) -> tuple[str, ...]:
    """The entries of a block list at a path or s3://bucket/name, each once, in order of their letters.

    An entry a line; what follows "#" at a line's start or behind a space is a comment. Refused, naming file and line,
    for what is no entry.
    """
    try:
        lines = _content(uri).decode("utf-8-sig").split("\n")
    except (OSError, Unreadable) as error:
        raise Refused(f"download.block_file: {uri} cannot be read: {getattr(error, 'strerror', '') or error}") from None
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise Refused(f"download.block_file: {uri}, line {number}: this is not UTF-8") from None
    entries = set[str]()
    for number, line in enumerate(lines, 1):
        if not (entry := _COMMENT.sub("", line).strip()):
            continue
        if wrong := fault(entry):
            raise Refused(f"download.block_file: {uri}, line {number} has {entry!r}{wrong}")
        entries.add(entry)
    return tuple(sorted(entries))


def entries_digest(entries: tuple[str, ...]) -> str:
    """SHA-256 (hex) of what a file blocks, whatever else stands in it; "" of nothing."""
    return digest(canonical(list(entries))) if entries else ""


def _content(uri: str) -> bytes:
    if not uri.startswith("s3://"):
        return Path(uri).expanduser().read_bytes()
    folder, _, name = uri.rpartition("/")
    return open_location(folder).get(name)


def _ascii(host: str) -> str:
    return (host if host.isascii() else host.encode("idna").decode()).lower()
