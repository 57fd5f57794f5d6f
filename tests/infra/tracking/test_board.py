"""What is told of stages of many shards: rows, rates and times left, whatever order the words come in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.tracking.board import WINDOW_S, ProgressBoard, StageExtent, StageProgress, success_rate


@dataclass
class Clock:
    """A clock that is set by hand."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def account(shards: int, present: int = 0, states: dict[str, int] | None = None) -> tuple[StageProgress, Clock]:
    clock = Clock()
    return StageProgress(StageExtent(shards, present, states or {}), clock), clock


def test_rows_of_shards_under_way_count_towards_rate_share_and_time_left() -> None:
    one, clock = account(4)
    clock.now += 10
    one.told("a", {"kept": 40, "http_404": 10}, 100)
    assert one.values() == {"shards": 0.0, "rows": 50.0, "rows_per_s": 5.0, "success_rate": 0.8}
    assert one.left() == pytest.approx(70)  # half a shard in ten seconds, and three and a half to go
    one.finished("a", {"kept": 90, "http_404": 10})
    assert one.values() == {"shards": 1.0, "rows": 100.0, "rows_per_s": 10.0, "success_rate": 0.9}
    assert one.left() == pytest.approx(30)


def test_what_earlier_runs_did_counts_as_rows_and_not_as_speed() -> None:
    one, clock = account(4, 2, {"kept": 150, "timeout": 50})
    assert one.values() == {"shards": 2.0, "rows": 200.0, "rows_per_s": 0.0, "success_rate": 0.75}
    assert one.left() is None
    clock.now += 10
    one.finished("c", {"kept": 100})
    assert (one.done, one.rate(), one.left()) == (3, 10.0, pytest.approx(10))


def test_the_rate_is_of_the_last_half_minute_and_sinks_when_nothing_comes() -> None:
    one, clock = account(100)
    for number in range(20):
        clock.now += 10
        one.finished(str(number), {"kept": 10 if number < 10 else 1000})
    assert one.rate() == pytest.approx(100)
    clock.now += 10 * WINDOW_S
    assert one.rate() < 15


def test_a_shard_that_is_begun_anew_is_counted_once_and_late_words_change_nothing() -> None:
    one, _ = account(1)
    one.told("a", {"kept": 70}, 100)
    one.told("a", {"kept": 3}, 100)  # its worker died, and another has begun
    assert one.so_far == {"kept": 3}
    one.finished("a", {"kept": 99, "truncated": 1})
    one.told("a", {"kept": 50}, 100)
    one.finished("a", {"kept": 99, "truncated": 1})
    assert (one.so_far, one.done) == ({"kept": 99, "truncated": 1}, 1)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcd"),
            st.dictionaries(st.sampled_from(["kept", "x", "y"]), st.integers(0, 50)),
            st.booleans(),
        )
    )
)
def test_in_any_order_rows_are_of_each_shards_end_or_its_last_word(
    words: list[tuple[str, dict[str, int], bool]],
) -> None:
    one, _ = account(4)
    ends: dict[str, dict[str, int]] = {}
    last: dict[str, dict[str, int]] = {}
    for shard, states, done in words:
        if done:
            one.finished(shard, states)
            ends.setdefault(shard, states)
        else:
            one.told(shard, states, 50)
            last[shard] = states
    expected: Counter[str] = Counter()
    for states in {**last, **ends}.values():
        expected.update(states)
    assert +one.so_far == +expected
    assert one.done == len(ends)


def test_a_stage_that_rejects_no_row_has_no_success_rate() -> None:
    assert success_rate({}) is None
    assert success_rate({"looked": 5}) is None
    assert success_rate({"timeout": 5}) == 0.0
    assert success_rate({"kept": 3, "timeout": 1}) == 0.75


def test_a_stage_that_has_ended_stays_on_the_board() -> None:
    board = ProgressBoard()
    board.begin("download", StageExtent(2))
    board.shard("download", "a", {"kept": 2}, 0, done=True)
    board.finish("download")
    board.shard("download", "b", {"kept": 5}, 9, done=False)  # late
    shown = board.shown()["download"]
    assert (shown["done"], shown["total"], shown["rows"], shown["success"]) == (1, 2, 2, 1.0)
