"""What is never asked: hosts, and patterns of URLs."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from infra.errors import Refused


class Blocklist:
    """Entries without a slash are hosts, each with all hosts below it; entries with one are globs (`*`, `?`, `[…]`)
    over the whole URL as it is asked, `https://host/path?query`, letters of either case.

    Raises Refused for an entry that can be neither.
    """

    def __init__(self, entries: Iterable[str] = ()) -> None:
        hosts, globs = set[str](), list[str]()
        for entry in entries:
            if not entry.strip() or entry != entry.strip():
                raise Refused(f"download.block has {entry!r}; write a host, or a pattern of URLs such as */ads/*")
            if "/" in entry:
                globs.append(fnmatch.translate(entry))
            elif re.search(r"[*?\[\s:]", entry):
                raise Refused(
                    f"download.block has {entry!r}: a host stands for all below it, without * or port; a pattern of "
                    "URLs has a slash, such as http*://*/ads/*"
                )
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


def _ascii(host: str) -> str:
    try:
        return (host if host.isascii() else host.encode("idna").decode()).lower()
    except UnicodeError as error:
        raise Refused(f"download.block has {host!r}, which is no host name: {error}") from None
