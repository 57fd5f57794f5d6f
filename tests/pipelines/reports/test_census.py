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

from infra.concurrent import map_ordered
from infra.records.commits import commit
from infra.records.manifest import Action, Record
from infra.records.objects import object_name
from infra.records.parquet import SMALL, columns
from infra.records.schemas import KEPT
from infra.store.base import Store
from infra.store.opening import open_store
from pipelines.reports.census import (
    ARRAYS,
    DatasetStats,
    Hosts,
    Row,
    _chosen,
    count_dataset,
    count_shard,
    shards,
    stored,
)
from pipelines.reports.charts import histogram, linear
from pipelines.reports.page import count
from pipelines.versions.forget import forget, names_of
from tests.fixtures.chain import Chain, run
from tests.fixtures.stages import Data


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

    results = map_ordered(work, range(1000), 2)
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


def test_a_shard_is_counted_once_and_for_all(chain: Chain, tmp_path: Path) -> None:
    """What was counted of the shards is all that is read of them, and says the same."""
    own = chain.copy(tmp_path / "store")
    bare = {name: one for name, one in own.made.items() if name != "data-count"}
    plain = [count_shard(own.store, shard.tables, shard.number) for shard in shards(bare)]
    for shard in shards(bare):
        for file in filter(None, shard.tables):
            own.store.delete(object_name(file.sha256))
    again = [stored(own.store, record, number) for number, record in enumerate(own.made["data-count"].records)]
    assert len(again) > 1
    for one, other in zip(plain, again, strict=True):
        assert one.hosts == other.hosts
        assert one.shown == other.shown
        for name in ARRAYS:
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
    total, added = count_dataset(own.store, own.made), DatasetStats()
    for part in plain:
        added.add(part)
    assert (total.by_host, total.shown) == (added.by_host, added.shown)
    assert all(np.array_equal(getattr(total, name), getattr(added, name)) for name in ARRAYS)


def test_only_shards_that_have_changed_are_counted_again(chain: Chain, data: Data, tmp_path: Path) -> None:
    own = chain.copy(tmp_path / "store")
    before = {entry.name for entry in own.store.list("records/data-count-1/")}
    assert len(before) == len(own.made["download"].records)
    forget(own.store, names_of(uids=(min(own.stays("curate")).hex(),)))
    made = run(own.store, data, own.made["source"])
    anew = {entry.name for entry in own.store.list("records/data-count-1/")} - before
    pairs = zip(shards(own.made), shards(made), strict=True)
    assert len(anew) == sum(one.tables != other.tables for one, other in pairs)
    assert 0 < len(anew) < len(before)
