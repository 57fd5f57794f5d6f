"""Live progress: what a shard tells on its way, and how a person reads it with and without a terminal."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console as Terminal

from infra.records.objects import object_name
from infra.store.opening import open_store
from infra.tracking.board import ProgressBoard, StageExtent, StageProgress
from pipelines import progress
from pipelines.engine import console
from pipelines.engine.console import Console
from pipelines.engine.graph import resolve
from pipelines.progress import count_row, expect_rows, reporting_to
from tests.fixtures.stages import Data, download


def test_a_download_tells_row_by_row_what_its_record_says_in_the_end(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "OFTEN_S", 0.0)
    store = open_store(data.store.uri)
    stage = download(data.server.port)
    action = resolve(stage, [data.source], store).actions[0]
    fresh = open_store(str(tmp_path / "store"))  # so that there is no record yet
    fresh.put_new(object_name(action.inputs[0]), store.local(object_name(action.inputs[0])))
    heard: list[tuple[dict[str, int], int]] = []
    with reporting_to(lambda states, rows: heard.append((dict(states), rows))), fresh.scratch() as out:
        record = stage.run(action, fresh, out)
    assert {rows for _, rows in heard} == {record.rows}
    totals = [sum(states.values()) for states, _ in heard]
    assert totals == sorted(totals)
    assert heard[-1][0] == record.states
    assert len(heard) > 20


def test_a_shard_tells_about_once_a_second_and_nobody_where_nobody_listens() -> None:
    heard: list[Mapping[str, int]] = []
    expect_rows(5)
    count_row("kept")
    with reporting_to(lambda states, rows: heard.append(states)):
        expect_rows(10_000)
        for _ in range(10_000):
            count_row("kept")
    assert len(heard) <= 1


def said(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[str]:
    """Lines that a console without a terminal prints of a download that is told of for so many seconds."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    live = Console(["download"], Terminal(file=out, width=200))
    board = ProgressBoard()
    with live:
        live.state("download", "running", 0, 8)
        board.accounts["download"] = StageProgress(StageExtent(8), lambda: now[0])
        for second in range(int(seconds)):
            now[0] += 1
            board.shard("download", "a", {"kept": 90 * second, "http_404": 10 * second}, 100_000, done=False)
            live.board(board.shown())
        live.state("download", "done", 8, 8, seconds, {"kept": 720_000, "http_404": 80_000})
    return out.getvalue().splitlines()


def test_without_a_terminal_a_stage_says_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(monkeypatch, 300)
    assert len(lines) == 2 + 300 // 61
    assert lines[0].split()[1:] == ["download", "running", "0/8", "shards"]
    for line in lines[1:-1]:
        assert all(part in line for part in ("0/8 shards", " rows ", "100 rows/s", "90.0 % kept", " left"))
    assert lines[-1].endswith("8/8 shards 800,000 rows 90.0 % kept")


@pytest.mark.parametrize("columns", [80, 120])
def test_the_live_table_shows_rows_share_kept_and_time_left(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(width=columns, file=io.StringIO(), force_terminal=True, color_system=None)
    live = Console(["evaluate-sample", "download"], terminal)
    live.state("download", "running", 0, 1000)
    told = {
        "done": 412,
        "total": 1000,
        "unit": "shards",
        "rate": 3411.6,
        "rows": 4_123_456,
        "success": 0.9182,
        "left": 1720.0,
    }
    live.board({"download": told})
    terminal.print(live._table())
    line = [line for line in terminal.file.getvalue().splitlines() if "download" in line][-1]  # type: ignore[attr-defined]
    assert all(part in line for part in ("412/1,000 shards", "3,412/s", "91.8 %", "28:40"))
    assert ("4,123,456" in line) == (columns > 100)
    assert "…" not in line


def test_a_stage_that_goes_on_does_not_take_what_was_there_for_its_own_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    live = Console(["download"], Terminal(file=io.StringIO()))
    live.state("download", "running", 990, 1000)
    time.sleep(0.01)
    assert live.rows["download"].eta() is None
