"""The one error type of this floor that is meant for the person at the terminal."""

from __future__ import annotations


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
