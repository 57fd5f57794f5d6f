"""Local copies of what lies in S3, whole files and parts of such, below $UNCLIP_CACHE_GB, by what was used last."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from infra.errors import EXPECTED, Refused, Unavailable, advice

_IN_USE_S = 3600
_PART = "@"
"""Between the name of a file and (start)-(length) of the part of it that a copy has."""
# Of the few, a part's is shared with others by chance: they then wait for each other.
_LOCKS = tuple(threading.Lock() for _ in range(64))
_fetched: Counter[Path] = Counter()  # bytes that this process fetched into a folder since it last looked at its size


def count_fetched(copies: Path, count: int) -> None:
    """Counts bytes that were fetched into a folder of copies, and trims it once they matter."""
    _fetched[copies] += count
    if _fetched[copies] > cache_bytes() // 16:
        _fetched[copies] = 0
        trim(copies, cache_bytes())


@dataclass(frozen=True)
class Parts:
    """The copies in a folder of one name's bytes."""

    copies: Path
    name: str

    def part(
        self,
        start: int,
        length: int,
        first: int,
        most: int,
        get: Callable[[int, int], bytes],
        scratch: Callable[[], AbstractContextManager[Path]],
    ) -> bytes:
        """The bytes [start, start + length), out of a whole copy or of that of the part [first, first + most), which is
        got (start, length) where neither is there. One thread of this process gets a part, and others wait for it."""
        if (kept := self._read(start, length, first, most)) is not None:
            return kept
        with _LOCKS[hash((self.name, first, most)) % len(_LOCKS)]:
            if (kept := self._read(start, length, first, most)) is not None:
                return kept
            data, path = get(first, most), self._path(first, most)
            with writing_copies(self.copies), scratch() as folder:
                path.parent.mkdir(parents=True, exist_ok=True)
                written = folder / "part"
                written.write_bytes(data)
                os.chmod(written, 0o444)
                os.replace(written, path)  # whole or not at all
        count_fetched(self.copies, len(data))
        return data[start - first : start - first + length]

    def _read(self, start: int, length: int, first: int, most: int) -> bytes | None:
        for path, offset in ((self.copies / self.name, start), (self._path(first, most), start - first)):
            with suppress(FileNotFoundError), open(path, "rb") as file:
                os.utime(file.fileno())  # used just now, which `trim` goes by
                file.seek(offset)
                return file.read(length)
        return None

    def delete(self) -> None:
        """Removes the copy and those of all parts."""
        whole = self.copies / self.name
        for path in (whole, *whole.parent.glob(f"{escape(whole.name)}{_PART}*")):
            path.unlink(missing_ok=True)

    def _path(self, first: int, most: int) -> Path:
        whole = self.copies / self.name
        return whole.with_name(f"{whole.name}{_PART}{first}-{most}")


def cache_bytes() -> int:
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

    Other processes use the folder too: a whole file that was asked for within `_IN_USE_S` stays, even above the bound.
    A part is read at once by whoever asks for it, so that it may go at any time. A file that is open outlives its name,
    and whoever asks for it again gets a new copy.
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
        if over <= 0:
            return
        if time.time() - used < _IN_USE_S and _PART not in os.path.basename(path):
            continue
        with suppress(FileNotFoundError):
            os.unlink(path)
        over -= size


@contextmanager
def writing_copies(copies: Path) -> Iterator[None]:
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
