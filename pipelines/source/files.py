"""Where a source's files lie: a folder, or a prefix of S3; and which of them a path, a folder or a glob names.

A name never leads out of its place: in a folder no link is followed, not even one that is put there while the file is
being opened, and what is no regular file (a device, a pipe) is not read.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol, cast

from infra.errors import NotFound, Refused
from infra.store import Store, open_store

CHUNK = 4 << 20
PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip")
"""Endings of compressed files, none of which is read."""
_MAGIC = re.compile(r"[*?\[]")
_NOFOLLOW = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # opening a pipe must not wait for its writer


class Unreadable(Exception):
    """A name that cannot be read; `state` is what its row becomes."""

    def __init__(self, state: str, name: str) -> None:
        super().__init__(f"{name}: {state}")
        self.state = state


@dataclass(frozen=True)
class SourceFile:
    """A file of a place: its name there and its size in bytes."""

    name: str
    bytes: int
    regular: bool = True
    """False for a link, a device or a pipe, which `open` refuses."""
    stamp: str = ""
    """Another one wherever its bytes are others, as far as its place can tell."""
    modified: float = 0.0
    """When it was written, in seconds since 1970."""

    @classmethod
    def of(cls, name: str, status: os.stat_result) -> SourceFile:
        """A file on a file system."""
        stamp = f"{status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
        changed = max(status.st_mtime, status.st_ctime)
        return cls(name, status.st_size, stat.S_ISREG(status.st_mode), stamp, changed)


class Location(Protocol):
    """Files that are read only, by names relative to the place."""

    def list(self) -> Iterator[SourceFile]:
        """All files, however deep, in the order of their names."""
        ...

    def open(self, name: str) -> BinaryIO:
        """A seekable file with the name's bytes; of S3, a copy. Unreadable where there is none to be read."""
        ...

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """The bytes [start, start + length) of a name; Unreadable."""
        ...

    def chunks(self, name: str) -> Iterator[bytes]:
        """A name's bytes, a few at a time; Unreadable."""
        ...


@dataclass(frozen=True)
class Folder:
    """A place on a file system."""

    root: Path

    def list(self) -> Iterator[SourceFile]:
        yield from self._walk("")

    def _walk(self, folder: str) -> Iterator[SourceFile]:
        with os.scandir(self.root / folder) as found:
            # A folder sorts as "name/", so that the whole is in the order in which S3 lists it.
            children = sorted(found, key=lambda child: child.name + "/" * child.is_dir(follow_symlinks=False))
        for child in children:
            name = folder + child.name
            if child.is_dir(follow_symlinks=False):
                yield from self._walk(f"{name}/")
            else:
                yield SourceFile.of(name, child.stat(follow_symlinks=False))

    def open(self, name: str) -> BinaryIO:
        *folders, last = parts(name)
        above = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for folder in folders:
                below = os.open(folder, _NOFOLLOW | os.O_DIRECTORY, dir_fd=above)
                os.close(above)
                above = below
            file = os.open(last, _NOFOLLOW, dir_fd=above)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
                raise Unreadable("no_file", name) from None
            if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):  # a link, on the way or at its end; a socket
                raise Unreadable("not_a_file", name) from None
            raise
        finally:
            os.close(above)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise Unreadable("not_a_file", name)
        return open(file, "rb")

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        with self.open(name) as file:
            file.seek(start)
            return file.read(-1 if length is None else length)

    def chunks(self, name: str) -> Iterator[bytes]:
        with self.open(name) as file:
            while chunk := file.read(CHUNK):
                yield chunk


@dataclass(frozen=True)
class Bucket:
    """A place in S3."""

    store: Store

    def list(self, prefix: str = "") -> Iterator[SourceFile]:
        for entry in self.store.list(prefix):
            if not entry.name.endswith("/"):  # an object that some tools put to stand for a folder
                put = entry.modified
                yield SourceFile(entry.name, entry.bytes, stamp=put.isoformat(), modified=put.timestamp())

    def open(self, name: str) -> BinaryIO:
        copy = cast(BinaryIO, tempfile.TemporaryFile(prefix="unclip-"))  # noqa: SIM115 - the caller closes it
        try:
            for chunk in self.chunks(name):
                copy.write(chunk)
        except BaseException:
            copy.close()
            raise
        copy.seek(0)
        return copy

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        parts(name)
        if not name.isprintable() or "\\" in name:  # a Store knows no such names
            raise Unreadable("bad_name", ascii(name[:80]))
        try:
            return self.store.get(name, start, length)
        except NotFound:
            raise Unreadable("no_file", name) from None

    def chunks(self, name: str) -> Iterator[bytes]:
        start = 0
        while chunk := self.get(name, start, CHUNK):
            yield chunk
            start += len(chunk)
            if len(chunk) < CHUNK:
                return


def parts(name: str) -> list[str]:
    """The parts of a name; Unreadable, as `bad_name`, unless it is relative, stays in its place and is text."""
    split = name.split("/")
    if any(part in ("", ".", "..") for part in split) or "\0" in name or not is_text(name):
        raise Unreadable("bad_name", ascii(name[:80]))
    return split


def is_text(text: str) -> bool:
    """Whether it can be written in UTF-8: what a file system or JSON calls text may hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_location(uri: str) -> Location:
    """The folder at a path, or the prefix s3://bucket/prefix; Refused if there is no such folder or bucket."""
    if uri.startswith("s3://"):
        return Bucket(open_store(uri.rstrip("/"), create=False))
    root = Path(uri).expanduser()
    if not root.is_dir():
        raise Refused(f"there is no folder {uri!r}")
    return Folder(root)


def location_name(base: str) -> str:
    """A place's name that means the same to every process: absolute, and of S3 with its server."""
    if base.startswith("s3://"):
        return f"{os.environ.get('AWS_ENDPOINT_URL', '')} {base}"
    return str(Path(base).expanduser().resolve())


def find_files(uri: str, endings: Collection[str], key: str) -> tuple[str, list[SourceFile]]:
    """What a file's name, a folder's (its direct children) or a glob stands for: (place, its files by name).

    endings: suffixes that count, such as ".csv". key: the recipe's, for Refused, which comes where nothing is found.
    A glob knows *, ?, [abc], none of which matches a slash, and ** for any number of folders; a file or folder of just
    that name comes first.
    """
    return (_in_bucket if uri.startswith("s3://") else _in_folder)(uri, endings, key)


def _in_folder(uri: str, endings: Collection[str], key: str) -> tuple[str, list[SourceFile]]:
    path = Path(uri).expanduser()
    if path.is_dir():
        there = list(path.iterdir())
        files = sorted(child for child in there if _ends(child.name, endings) and child.is_file())
        if not files:
            raise Refused(f"{key}: the folder {uri} has no file that ends in {_wanted(endings, there)}")
        base = path
    elif path.is_file():
        if path.suffix not in endings:
            raise Refused(f"{key}: {path.name} ends in none of {_wanted(endings, [path])}")
        base, files = path.parent, [path]
    elif _MAGIC.search(uri):
        base = Path(*path.parts[: next(n for n, part in enumerate(path.parts) if _MAGIC.search(part))])
        named = sorted(Path(name) for name in glob.iglob(str(path), recursive=True))
        found = {file.resolve(): file for file in reversed(named) if file.suffix in endings and file.is_file()}
        files = sorted(found.values())  # ** goes through links as well, and may come to a file by two ways
        if not files:
            raise Refused(f"{key}: no file that ends in {_wanted(endings, named)} matches {uri}")
    else:
        raise Refused(f"{key}: there is no file or folder {uri!r}")
    return str(base), [SourceFile.of(file.relative_to(base).as_posix(), file.stat()) for file in files]


def _in_bucket(uri: str, endings: Collection[str], key: str) -> tuple[str, list[SourceFile]]:
    split = uri.rstrip("/").split("/")
    # Of "s3:", "", bucket, … the first that is no plain name begins the pattern.
    first = next((n for n, part in enumerate(split) if n > 2 and _MAGIC.search(part)), None)
    if first is None:
        first = len(split) - 1 if len(split) > 3 and Path(split[-1]).suffix in endings else len(split)
    base, pattern = "/".join(split[:first]), split[first:]
    bucket = Bucket(open_store(base, create=False))
    literal = _MAGIC.split("/".join(pattern))[0]
    wanted = pattern or ["*"]
    try:
        there = [found for found in bucket.list(literal) if matches(found.name.split("/"), wanted)]
    except NotFound as error:
        raise Refused(f"{key}: {uri} cannot be read: {error}") from error
    files = [found for found in there if _ends(found.name, endings)]
    if not files:
        raise Refused(f"{key}: {uri} has no object that ends in {_wanted(endings, (Path(one.name) for one in there))}")
    return base, files


def _ends(name: str, endings: Collection[str]) -> bool:
    """Whether a file counts; hidden ones do not, as a shell's * does not name them."""
    path = PurePosixPath(name)
    return path.suffix in endings and not path.name.startswith(".")


def _wanted(endings: Collection[str], there: Iterable[Path]) -> str:
    """The endings that count, for a refusal, and what is said of those that were found instead."""
    packed = [path.name for path in there if path.suffix in PACKED and path.with_suffix("").suffix in endings]
    return f"{', '.join(endings)}{f'; unpack {packed[0]} first' if packed else ''}"


def matches(name: list[str], pattern: list[str]) -> bool:
    """Whether a name's parts are those of a glob's; ** stands for any number of them."""
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(matches(name[skip:], pattern[1:]) for skip in range(len(name) + 1))
    return bool(name) and fnmatchcase(name[0], pattern[0]) and matches(name[1:], pattern[1:])
