"""A store in a folder: each file is written whole before it gets its name, by a hard link."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from infra.errors import EXPECTED, FULL, NotFound, Refused, Unavailable, advice
from infra.process import Process
from infra.store.base import RESERVED, Entry, check_name

_CHUNK = 1 << 20


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
