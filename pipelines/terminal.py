"""What every command does with a terminal and a store: open the one, write to the other."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any

WIDE = 10_000
"""Columns of a table that no person reads."""


@contextlib.contextmanager
def opened(uri: str) -> Iterator[Any]:
    """The store there; Refused where there is none."""
    from infra.store import open_store

    yield open_store(uri, create=False)


def say(text: str) -> None:
    """A line."""
    sys.stdout.write(text + "\n")


def show(renderable: Any) -> None:
    """A table: as wide as the terminal; whole lines, nothing cut, where a program reads it."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console(highlight=False).print(renderable, markup=False)
        return
    wide = Console(file=io.StringIO(), width=WIDE, highlight=False, color_system=None)
    wide.print(renderable, markup=False, soft_wrap=True)
    say("\n".join(line.rstrip() for line in wide.file.getvalue().splitlines()))  # type: ignore[attr-defined]
