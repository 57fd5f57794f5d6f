"""What every command does with a terminal and a store: lines, tables, a bar while something goes on."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

WIDE = 10_000
"""Columns of a table that no person reads."""


@contextlib.contextmanager
def opened(uri: str) -> Iterator[Any]:
    """The store there; Refused where there is none."""
    from infra.store import open_store

    yield open_store(uri, create=False)


def say(text: str) -> None:
    """A line on standard output."""
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


def columns(*titles: str) -> Any:
    """A table with these titles, without lines; the last column folds."""
    from rich.table import Table

    out = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title in titles[:-1]:
        out.add_column(title, no_wrap=True)
    out.add_column(titles[-1], overflow="fold")
    return out


@contextlib.contextmanager
def meter(unit: str = "") -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, if that is a terminal: call it with what is done, how much of it, of how much (0: not
    known). unit "bytes" shows sizes and rates."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = DownloadColumn(binary_units=False) if unit == "bytes" else MofNCompleteColumn()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        count,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    tasks: dict[str, Any] = {}

    def told(what: str, done: int, total: int) -> None:
        if what not in tasks:
            for other in tasks.values():
                bar.update(other, visible=False)
            tasks[what] = bar.add_task(what)
        bar.update(tasks[what], completed=done, total=total or None, visible=True)

    with bar:
        yield told


def size(count: int) -> str:
    """Bytes for a person: 1.5 GB."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
