"""Local copies of what lies in S3: a folder of files that are whole, below $UNCLIP_CACHE_GB, by what was used last."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from infra.errors import Refused, Unavailable
from infra.store import EXPECTED, advice

_IN_USE_S = 3600
_fetched: Counter[Path] = Counter()  # bytes that this process fetched into a folder since it last looked at its size


def fetched(copies: Path, count: int) -> None:
    """Counts bytes that were fetched into a folder of copies, and trims it once they matter."""
    _fetched[copies] += count
    if _fetched[copies] > bound() // 16:
        _fetched[copies] = 0
        trim(copies, bound())


def bound() -> int:
    """Bytes that the copies of one store may take: $UNCLIP_CACHE_GB (10^9 bytes), 100 if it is not set."""
    text = os.environ.get("UNCLIP_CACHE_GB", "100")
    try:
        wanted = float(text)
    except ValueError:
        wanted = -1
    if not wanted >= 0:
        raise Refused(f"UNCLIP_CACHE_GB is {text!r}; it is the size of the local cache of S3 objects, such as 50")
    return int(wanted * 1e9) if wanted < 1e9 else 1 << 62


def trim(copies: Path, most: int) -> None:
    """Removes the copies used longest ago until the others take at most so many bytes.

    Other processes use the folder too: what was asked for within `_IN_USE_S` stays, even above the bound. A file that
    is open outlives its name, and whoever asks for it again gets a new copy.
    """
    found = []
    for folder, below, names in os.walk(copies):
        if folder == str(copies):
            below[:] = [name for name in below if name != "tmp"]
        for name in names:
            with suppress(FileNotFoundError):
                status = os.stat(os.path.join(folder, name))
                found.append((status.st_mtime, status.st_size, os.path.join(folder, name)))
    over = sum(size for _, size, _ in found) - most
    for used, size, path in sorted(found):
        if over <= 0 or time.time() - used < _IN_USE_S:
            return
        with suppress(FileNotFoundError):
            os.unlink(path)
        over -= size


@contextmanager
def copying(copies: Path) -> Iterator[None]:
    """Around what writes copies: a disk that is full or may not be written to is Refused, code 5, with what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in EXPECTED:
            raise
        raise Unavailable(
            f"{copies}, where copies of S3 objects are kept: {advice(error)} The folder is below $XDG_CACHE_HOME, its "
            "size $UNCLIP_CACHE_GB."
        ) from error
