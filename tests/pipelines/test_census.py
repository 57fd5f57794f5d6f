"""How rows are counted and chosen for the page about the data: exact or with the error said, and in bounded memory."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.columns import SMALL, ahead, columns
from infra.manifest import Action, Record, commit
from infra.rows import KEPT
from infra.store import Store, open_store
from pipelines.census import Hosts, Row, _chosen
from pipelines.charts import histogram, linear
from pipelines.page import count


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), max_size=400), st.integers(1, 8))
def test_hosts_are_counted_exactly_while_they_fit_and_never_worse_than_is_said(stream: list[int], most: int) -> None:
    hosts, true = Hosts(most), Counter(stream)
    for host in stream:
        hosts.add(str(host), KEPT, 1)
    assert len(hosts.counts) <= 2 * most
    for host, rows in true.items():
        known = hosts.counts.get(str(host), Counter()).total()
        assert rows - hosts.missed <= known <= rows
    if len(true) <= 2 * most:
        assert hosts.missed == 0


@settings(deadline=None)
@given(st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=60, unique=True), st.integers(1, 20))
def test_the_choice_of_rows_does_not_depend_on_how_they_are_cut_into_shards(uids: list[bytes], most: int) -> None:
    whole = [row.uid for row in _chosen(pa.array(uids, pa.binary(16)), 0, "", most)]
    parts = [_chosen(pa.array(part, pa.binary(16)), 0, "", most) for part in (uids[::2], uids[1::2])]
    keys = sorted(row.key for part in parts for row in part)[:most]
    assert sorted(int.from_bytes(one[8:], "big") for one in whole) == keys
    assert len(whole) == min(most, len(uids))
    assert Row(1, 0, b"") < Row(2, 0, b"")


@dataclasses.dataclass
class Counting:
    """A store that counts the bytes that are fetched from it."""

    store: Store
    fetched: int = 0

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        data = self.store.get(name, start, length)
        self.fetched += len(data)
        return data


def test_of_a_large_file_only_the_columns_that_are_asked_for_are_fetched(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    noise = np.random.default_rng(0).integers(0, 256, (2000, 4096), np.uint8)
    whole = pa.table({"image": [row.tobytes() for row in noise], "score": np.arange(2000.0), "uid": ["x"] * 2000})
    action = Action("embed/1", {}, ())
    with store.scratch() as out:
        pq.write_table(whole, out / "rows.parquet", row_group_size=256)
        record = commit(store, action, Record.of(action, out), out)
    file = record.files["rows.parquet"]
    assert file.bytes > SMALL
    counting = Counting(store)
    found = columns(counting, file, ["uid", "score", "no such column"])  # type: ignore[arg-type]
    assert found.equals(whole.select(["score", "uid"]).select(found.column_names))
    assert counting.fetched < file.bytes / 50


def test_reading_ahead_keeps_the_order_and_holds_few() -> None:
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        return number

    results = ahead(work, range(1000), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(begun) <= 8
    assert list(results) == list(range(3, 1000))


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=200), st.lists(st.integers(0, 300), max_size=200))
def test_a_histogram_draws_every_row_within_its_frame(stays: list[int], goes: list[int]) -> None:
    counted = np.stack([np.bincount(values, minlength=301) for values in (stays, goes)])
    chart = histogram("t", "a", counted, linear(1.0, count))
    assert chart is not None
    assert chart.rows == len(stays) + len(goes)
    said = [re.findall(r"([\d\u202f]+) stay, ([\d\u202f]+) do not", bar.said)[0] for bar in chart.bars]
    for column, values in enumerate((stays, goes)):
        assert sum(int(one[column].replace("\u202f", "")) for one in said) == len(values)
    assert 12 <= len(chart.bars) <= 40
    assert all(bar.x >= 46 and bar.x + bar.width <= 352.01 and sum(bar.heights) <= 145 for bar in chart.bars)
    assert chart.median == count(sorted(stays)[(len(stays) - 1) // 2])
    assert json.dumps(dataclasses.asdict(chart))
