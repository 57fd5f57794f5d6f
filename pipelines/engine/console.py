"""What a person sees while a run goes on: one table of stages in a terminal, sparse lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console as Terminal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from infra.tracking import success_rate

QUIET_SECONDS = 60.0
"""Where nobody watches a terminal, a running stage says so at most this often."""

WIDE = 110
"""Columns of a terminal that has room for bars."""

_STYLES = {"done": "green", "present": "dim", "running": "bold cyan", "failed": "bold red", "skipped": "yellow"}


@dataclass
class _Row:
    """Where one stage stands. done and total count shards until a trainer or task reports finer steps."""

    state: str = ""
    done: float = 0
    total: float = 0
    unit: str = "shards"
    rate: float | None = None
    loss: float | None = None
    rows: int = 0
    """Rows that the stage has gone through, those of shards under way included."""
    success: float | None = None
    """The share of them with which it succeeded."""
    left: float | None = None
    began: float = field(default_factory=time.monotonic)
    seconds: float | None = None
    told: float = 0.0

    def eta(self) -> float | None:
        """Seconds left at the rate so far, or None where nothing can be said."""
        if self.state != "running" or not self.total:
            return None
        if self.left is not None or self.unit == "shards":  # of shards only the board knows when they began
            return self.left
        if self.rate and self.unit == "samples":
            return (self.total - self.done) / self.rate
        return (time.monotonic() - self.began) * (self.total - self.done) / self.done if self.done else None


class Console:
    """Thread-safe; `with console:` around a run."""

    def __init__(self, stages: Sequence[str], terminal: Terminal | None = None) -> None:
        self.terminal = terminal or Terminal(highlight=False)
        self.rows = {name: _Row() for name in stages}
        self.began = time.monotonic()
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._note = ""

    def __enter__(self) -> Console:
        if self.terminal.is_terminal:
            self._live = Live(console=self.terminal, get_renderable=self._table, refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._note = ""
        if self._live:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        """A word on what the driver itself is doing (starting Ray, writing the list); "" when it has done it."""
        with self._lock:
            self._note = text
            if text and not self._live:
                self.terminal.print(f"{self._clock()} {text}", markup=False)

    def state(
        self,
        name: str,
        state: str,
        done: float = 0,
        total: float = 0,
        seconds: float | None = None,
        states: Mapping[str, int] | None = None,
    ) -> None:
        """A stage's state: waiting, running, present, done, failed, skipped. done and total in shards; states of the
        rows, once they are known."""
        with self._lock:
            row = self.rows.setdefault(name, _Row())
            changed = state != row.state
            if changed and state == "running":
                row.began = time.monotonic()
            row.state, row.seconds = state, seconds if seconds is not None else row.seconds
            if states:
                row.rows, row.success = sum(states.values()), success_rate(states)
            if row.unit == "shards" or state != "running":
                row.done, row.total = (done, total) if total else (row.done, row.total)
                row.unit = "shards" if total else row.unit
            if not self._live and (changed or self._due(row)):
                self._say(name, row)

    def board(self, board: dict[str, dict[str, Any]]) -> None:
        """Progress as the workers told it to the monitor, in the words of `infra.tracking.board.Board.shown`."""
        with self._lock:
            for name, told in board.items():
                row = self.rows.get(name)
                if row is None or row.state != "running":
                    continue
                row.done, row.total, row.unit = told["done"], told["total"], told.get("unit") or row.unit
                row.rate, row.loss = told.get("rate"), told.get("loss")
                row.rows, row.success, row.left = told.get("rows", 0), told.get("success"), told.get("left")
                if not self._live and self._due(row):
                    self._say(name, row)

    def _due(self, row: _Row) -> bool:
        return row.state == "running" and time.monotonic() - row.told > QUIET_SECONDS

    def _say(self, name: str, row: _Row) -> None:
        row.told = time.monotonic()
        rows, figure, left = f"{row.rows:,} rows" if row.rows else "", _figure(row), _left(row)
        rate = _rate(row).replace("/s", " rows/s") if row.unit == "shards" else _rate(row)
        if figure:
            figure = f"loss {figure}" if row.loss is not None else f"{figure} kept"
        words = [_count(row), rows, rate, figure, f"{left} left" if left else ""]
        line = f"{self._clock()} {name:16} {row.state:10} {' '.join(filter(None, words))}"
        self.terminal.print(line.rstrip(), markup=False, soft_wrap=True)

    def _clock(self) -> str:
        return f"{_time(time.monotonic() - self.began):>7}"

    def _table(self) -> Table:
        with self._lock:
            wide = self.terminal.width >= WIDE
            table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2 if wide else 1, 0, 0))
            for title in ("stage", "", *[""] * wide):
                table.add_column(title, no_wrap=True)
            titles = ("done", *["rows"] * wide, "rate", "kept, loss", "left", "took")
            for title in titles:
                table.add_column(title, justify="right", no_wrap=True)
            for name, row in self.rows.items():
                share = row.done / row.total if row.total else 0.0
                bar = Text("━" * round(16 * share), style="cyan") + Text("━" * (16 - round(16 * share)), style="grey30")
                shown = row.state == "running" and row.total
                took = _time(row.seconds) if row.seconds is not None else ""
                table.add_row(name, Text(row.state, style=_STYLES.get(row.state, "")), *[bar if shown else ""] * wide,
                              _count(row), *[f"{row.rows:,}" if row.rows else ""] * wide, _rate(row), _figure(row),
                              _left(row), took)  # fmt: skip
            table.caption = f"{self._clock().strip()} {self._note}"
            table.caption_justify = "left"
            return table


def _count(row: _Row) -> str:
    return f"{row.done:,.0f}/{row.total:,.0f} {row.unit}" if row.total else ""


def _rate(row: _Row) -> str:
    return f"{row.rate:,.0f}/s" if row.rate and row.state == "running" else ""


def _figure(row: _Row) -> str:
    """How well it goes: the loss of a fit, the share of rows that a stage of many shards keeps."""
    if row.loss is not None:
        return f"{row.loss:.4f}" if row.state == "running" else ""
    return "" if row.success is None else f"{100 * row.success:.1f} %"


def _left(row: _Row) -> str:
    eta = row.eta()
    return "" if eta is None else _time(eta)


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
