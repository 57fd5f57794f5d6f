"""Errors for the person at the terminal: what was wrong, where, what to do. The command line prints no traceback."""

from __future__ import annotations

import errno


class Refused(ValueError):
    """What was asked for is impossible; the message says what was wrong, where, and what to do.

    The command line prints it as one paragraph, without a traceback, and exits with `code`:
    2 usage or input, 3 gate refused, 4 the ledger has moved on, 5 a stage failed.
    """

    code: int = 2

    def __init__(self, message: str, *, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


class Stopped(Refused):
    """What was asked to stop has stopped; what it had done is kept, and the same request goes on from there."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=5)


class Unavailable(Refused):
    """A store does not answer, or its disk has no room, just now: it may succeed later (`infra.store.retry`)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=5)


class NotFound(KeyError):
    """The store has nothing of that name."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__(name)
        self.name, self.where = name, where

    def __str__(self) -> str:
        return f"{self.name} is not in the store {self.where}"

    def __reduce__(self) -> tuple[type[NotFound], tuple[str, str]]:
        return NotFound, (self.name, self.where)


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
