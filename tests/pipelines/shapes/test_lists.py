from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from infra.errors import Refused
from pipelines.shapes import world
from pipelines.shapes.links import HOSTS
from pipelines.shapes.lists import training_list, write_list, write_prompts


def test_a_list_names_made_up_hosts_and_neither_port_nor_address(tmp_path: Path) -> None:
    write_list(tmp_path / "list.parquet", rows=500, seed=0)
    table = pq.read_table(tmp_path / "list.parquet")
    assert table.column_names == ["url", "caption", "source"]
    assert set(table["source"].to_pylist()) == set(HOSTS)
    assert len(set(table["url"].to_pylist())) == 500
    for url, host in zip(table["url"].to_pylist(), table["source"].to_pylist(), strict=True):
        assert url.startswith(f"http://{host}/seed0-pairs30/")


def test_a_list_and_prompts_have_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_list(tmp_path / f"{name}.parquet", rows=200, seed=5, pairs=0.5)
        write_prompts(tmp_path / f"{name}.jsonl", singles=40, pairs=20, seed=5)
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_the_rows_of_a_list_are_the_same_for_ever() -> None:
    rows = json.dumps(training_list(300, seed=0).to_pylist())
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == "31f40918cb2372a2"


def test_a_longer_list_begins_with_the_shorter_one() -> None:
    assert training_list(110, seed=0).slice(0, 100).equals(training_list(100, seed=0))


def test_seeds_and_shares_of_pairs_make_other_lists() -> None:
    lists = [training_list(50, seed=0), training_list(50, seed=1), training_list(50, seed=0, pairs=0.5)]
    assert len({json.dumps(table.to_pylist()) for table in lists}) == 3


def test_prompts_are_json_lines_with_what_they_expect(tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts.jsonl", singles=3, pairs=2, seed=0)
    lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["single"] * 3 + ["pair"] * 2
    assert all(line["expected"] == world.parse(line["prompt"]).attributes for line in lines)


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(Refused, match="at least one row"):
        training_list(0, seed=0)
