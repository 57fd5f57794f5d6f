"""Where everything lies: named bytes that are written once, in a folder or in S3.

There is one write, `put_new`: the first to put a name wins, for ever. Records, manifests, checkpoints, ledger entries
and leases are numbered or named by digest, so nothing needs to be overwritten, and two runs on one store are safe.
`s3.py` is the other implementation. A store is picklable and small: it travels to Ray workers.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from infra.errors import Refused, Unavailable
from infra.process import Process

# Folders of a local store that hold no named bytes: files being written, MLflow's database, copies for people.
RESERVED = ("tmp", "mlflow", "view")
RENEW_S = 3600
"""Bytes put again are dated anew once they are so many seconds old: much less than what gc spares."""
_CHUNK = 1 << 20


class NotFound(KeyError):
    """The store has nothing of that name."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__(name)
        self.name, self.where = name, where

    def __str__(self) -> str:
        return f"{self.name} is not in the store {self.where}"

    def __reduce__(self) -> tuple[type[NotFound], tuple[str, str]]:
        return NotFound, (self.name, self.where)


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


def open_store(uri: str, *, create: bool = True, cache: Path | None = None, endpoint: str | None = None) -> Store:
    """The store at a folder's path, or at `s3://bucket/prefix`.

    A folder is made if it does not exist, unless create is False: then it is not touched, and lists nothing.
    cache (S3 only): the folder of local copies, default `$XDG_CACHE_HOME/unclip`. endpoint (S3 only): the URL of an S3
    server other than Amazon's, default `$AWS_ENDPOINT_URL`. Refused if it cannot be read, or (create) not be written.
    """
    if uri.startswith("s3://"):
        from infra.store.s3 import S3Store

        return S3Store.open(uri, create=create, cache=cache, endpoint=endpoint)
    scheme, separator, path = uri.partition("://")
    if separator and scheme != "file":
        raise Refused(f"store {uri!r}: unknown scheme {scheme!r}. Use a folder's path, or s3://bucket/prefix.")
    if not uri:
        raise Refused("the store's name is empty. Use a folder's path, or s3://bucket/prefix.")
    folder = Path(path if separator else uri).expanduser().absolute()
    try:
        folder.exists()
    except (OSError, ValueError) as error:  # longer than a path may be, or with a character that none may have
        raise Refused(f"store {uri[:100]!r} is no folder's path: {error.args[-1]}") from None
    store = LocalStore(folder)
    store.check(create)
    return store


def check_name(name: str) -> str:
    """The name itself; Refused unless it is relative, made of parts that are no "." or "..", and outside RESERVED."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in name or not name.isprintable():
        raise Refused(f"{name!r} is no name for a store: parts between single slashes, none of them . or ..")
    if parts[0] in RESERVED:
        raise Refused(f"{name!r} is no name for a store: {parts[0]}/ is reserved")
    return name


@dataclass(frozen=True)
class LocalStore:
    """A store in a folder. Its files are read-only; each is written whole before it gets its name, by a hard link."""

    root: Path

    @property
    def uri(self) -> str:
        return str(self.root)

    @property
    def distant(self) -> bool:
        return False

    def check(self, create: bool) -> None:
        """Refused if the folder is none, or (create) cannot be made or written to; clears what killed writers left."""
        if self.root.exists() and not self.root.is_dir():
            raise Refused(f"store {self.root} is not a folder. Name a folder, or a path where one can be made.")
        if not create:
            return
        try:
            self._tmp.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._tmp):
                pass
        except OSError as error:
            if error.errno in FULL:
                raise Unavailable(f"store {self.root}: {advice(error)}") from error
            raise Refused(
                f"store {self.root} is not writable ({error.strerror or error}). "
                "Choose another with --store or $UNCLIP_STORE, or make it writable."
            ) from error
        sweep(self._tmp)

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        with self._found(name), open(self._path(name), "rb") as file:
            file.seek(start)
            return file.read(length)

    def part(self, name: str, start: int, length: int, within: tuple[int, int] | None = None) -> bytes:
        return self.get(name, start, length)

    def put_new(self, name: str, data: bytes | Path) -> bool:
        final = self._path(name)
        if final.exists():  # the common case of a second run: no copy is made
            return self._renewed(final, same_bytes(final, data))
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(data, Path) and data.is_relative_to(self._tmp):
                return self._link(data, final)
            self._tmp.mkdir(exist_ok=True)
            written = self._tmp / _scratch_name()
            try:
                if isinstance(data, Path):
                    shutil.copyfile(data, written)
                else:
                    written.write_bytes(data)
                return self._link(written, final)
            finally:
                written.unlink(missing_ok=True)
        except OSError as error:
            # Copying names the caller's file even where it is the store that has no room.
            if isinstance(data, Path) and error.filename == str(data) and error.errno not in FULL:
                raise  # the caller's file, not the store, is the trouble
            told = f"store {self.root}: {name} could not be written: {advice(error)}"
            raise (Unavailable(told) if error.errno in EXPECTED else Refused(told, code=5)) from error

    def list(self, prefix: str) -> Iterator[Entry]:
        folder = prefix.rpartition("/")[0]
        if folder:
            check_name(folder)
        yield from self._walk(folder, prefix)

    def local(self, name: str) -> Path:
        path = self._path(name)
        if not path.is_file():
            raise NotFound(name, self.uri)
        return path

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def scratch(self) -> AbstractContextManager[Path]:
        return scratch_folder(self._tmp)

    @property
    def _tmp(self) -> Path:
        return self.root / "tmp"

    def _path(self, name: str) -> Path:
        return self.root / check_name(name)

    @contextmanager
    def _found(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise NotFound(name, self.uri) from error

    def _renewed(self, final: Path, same: bool) -> bool:
        """Dates a file anew if the bytes put were its own; another user's file keeps its date."""
        if same:
            with suppress(FileNotFoundError, PermissionError):
                os.utime(final)
        return same

    def _link(self, written: Path, final: Path) -> bool:
        """Gives a written file its name, durably; if another was first, says whether its bytes are the same."""
        with open(written, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(written, 0o444)
        os.utime(written)  # when it was put, by the file system's clock, not when it was written
        try:
            os.link(written, final)
        except FileExistsError:
            return same_bytes(final, written)
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return True

    def _walk(self, folder: str, prefix: str) -> Iterator[Entry]:
        try:
            with os.scandir(self.root / folder) as found:
                # a folder sorts as "name/", so that the whole listing is sorted by name, as that of S3 is
                children = sorted(found, key=lambda child: child.name + "/" * child.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return
        for child in children:
            name = f"{folder}/{child.name}" if folder else child.name
            if not folder and child.name in RESERVED:
                continue
            if child.is_dir():
                if name.startswith(prefix) or prefix.startswith(name + "/"):
                    yield from self._walk(name, prefix)
            elif name.startswith(prefix):
                with suppress(FileNotFoundError):  # deleted since it was listed
                    status = child.stat()
                    yield Entry(name, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))


@contextmanager
def scratch_folder(tmp: Path) -> Iterator[Path]:
    """A new empty folder in tmp, named after this process; it goes when the context ends."""
    folder = tmp / _scratch_name()
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        if error.errno not in EXPECTED:
            raise
        raise Unavailable(f"{tmp}, where files are made on their way into the store: {advice(error)}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(tmp: Path) -> None:
    """Removes what processes of this host that were killed left behind in tmp."""
    for left in tmp.iterdir():
        if (writer := _writer(left.name)) and writer.dead():
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _scratch_name() -> str:
    writer = Process.this()
    return f"{writer.host}~{writer.pid}~{writer.started}~{uuid.uuid4().hex[:12]}"


def _writer(scratch_name: str) -> Process | None:
    parts = scratch_name.split("~")
    return Process(parts[0], int(parts[1]), parts[2]) if len(parts) == 4 and parts[1].isdigit() else None


def same_bytes(there: Path, data: bytes | Path) -> bool:
    """Whether a file holds just these bytes, or those of another file."""
    if isinstance(data, Path) and there.samefile(data):
        return True
    if isinstance(data, bytes):
        return there.stat().st_size == len(data) and there.read_bytes() == data
    if there.stat().st_size != data.stat().st_size:
        return False
    with open(there, "rb") as one, open(data, "rb") as other:
        while chunk := one.read(_CHUNK):
            if chunk != other.read(_CHUNK):
                return False
    return True


FULL = (errno.ENOSPC, errno.EDQUOT)
EXPECTED = (*FULL, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE)
"""What goes wrong with files through no fault of the program's."""


def advice(error: OSError) -> str:
    """What the system said, and what a person can do about it."""
    said = error.strerror or str(error)
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"{said}. Make room there, then run again: what is done stays done."
        case errno.EACCES | errno.EROFS:
            return f"{said}. Make the folder writable, or choose another with --store."
        case errno.EPERM | errno.EOPNOTSUPP | errno.EMLINK:
            return f"{said}. The store needs a file system with hard links; choose another folder with --store."
    return said
