"""A later pass over failed rows: the next generation of the shards that have some, and nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pytest

from infra.records.commits import commit, current_record
from infra.records.forgotten import FORGOTTEN, Forgotten, ForgottenNames, add_request, url_salt
from infra.records.manifest import Manifest, Record
from infra.records.schemas import KEPT
from infra.store.base import Store
from infra.store.opening import open_store
from pipelines.download.stage import PASSING, Download
from pipelines.engine.graph import resolve, why
from pipelines.select.stage import FeatureStage
from pipelines.shapes.server import serve
from tests.fixtures.stages import RULES, Data, download, make, source, todo
from tests.fixtures.web import give, serving
from tests.pipelines.download.test_download import indexes, listed

PATIENT: dict[str, Any] = {"retries": 1}
HASTY: dict[str, Any] = {"retries": 0}


@pytest.fixture
def hasty(data: Data, tmp_path: Path) -> Any:
    """A store in which no row was asked twice: (store, source, port of a server that has seen every URL once)."""
    store = open_store(str(tmp_path / "store"))
    with serve(slow=0.0) as server:
        listing = make(store, source(data.rows))
        make(store, download(server.port, **HASTY), listing)
        yield store, listing, server


def records(store: Store, stage: Download, listing: Manifest) -> list[Record]:
    return [record for action in stage.actions(listing) if (record := current_record(store, action)) is not None]


def test_the_shards_end_as_if_the_rows_had_been_kept_at_once(data: Data, hasty: Any):
    store, listing, server = hasty
    assert make(store, download(server.port, **HASTY), listing).version != data.download.version
    again = make(store, download(server.port, retry_pass=1, **PATIENT), listing)
    assert again.version == data.download.version
    assert again.rows == listing.states["listed"]


def test_only_rows_in_those_states_are_asked_and_the_others_stay(hasty: Any):
    store, listing, server = hasty
    before = indexes(store, make(store, download(server.port), listing))
    server.attempts.clear()
    after = indexes(store, make(store, download(server.port, retry_pass=1, retry_states=("http_503",)), listing))
    failed = [row for index in before for row in index.to_pylist() if row["state"] == "http_503"]
    assert failed
    assert server.attempts.keys() == {urlsplit(row["url"]).path for row in failed}
    for old, new in zip(before, after, strict=True):
        for was, now in zip(old.to_pylist(), new.to_pylist(), strict=True):
            if was["state"] == "http_503":
                assert now["state"] == KEPT
            else:
                assert was | {"offset": None} == now | {"offset": None}


def test_a_pass_that_was_made_is_not_made_again_and_holds_without_being_asked_for(hasty: Any):
    store, listing, server = hasty
    made = make(store, download(server.port, retry_pass=1, **PATIENT), listing)
    server.attempts.clear()
    for stage in (download(server.port, retry_pass=1), download(server.port)):
        assert todo(store, stage, listing) == 0
        assert make(store, stage, listing).version == made.version
    assert server.attempts.total() == 0
    assert 0 < todo(store, download(server.port, retry_pass=2), listing) <= len(made.records)


def test_only_shards_with_such_rows_get_a_generation_and_are_looked_at_anew(hasty: Any):
    store, listing, server = hasty
    first = make(store, download(server.port), listing)
    look = FeatureStage("filter", RULES)
    make(store, look, first)
    stage = download(server.port, retry_pass=1, retry_states=("http_503",))
    have = [record.states.get("http_503", 0) > 0 for record in first.records]
    assert todo(store, stage, listing) == sum(have)
    second = make(store, stage, listing)
    assert [record.generation for record in second.records] == [int(one) for one in have]
    assert todo(store, look, second) == sum(have)
    assert why(stage, resolve(stage, [listing], store).whole, store) == "failed rows are asked again"


def test_a_shard_whose_task_died_behind_its_commit_is_not_asked_again(hasty: Any):
    store, listing, server = hasty
    stage = download(server.port, retry_pass=1, **PATIENT)
    made = make(store, stage, listing)
    server.attempts.clear()
    for action, record in zip(stage.actions(listing), made.records, strict=True):
        with store.scratch() as out:
            assert commit(store, action, stage.run(action, store, out), out) == record
    assert server.attempts.total() == 0


def test_who_opted_out_is_never_asked_again_and_dead_hosts_hold_no_pass_up(tmp_path: Path):
    store = open_store(str(tmp_path / "store"))
    with serving() as web:
        web.answers["/no.png"] = lambda asked: give(asked, X_Robots_Tag="noai")
        urls = ["http://a.shapes.test/no.png", *(f"http://127.0.0.3:1/{number}" for number in range(9))]
        listing = listed(store, pa.table({"url": urls, "caption": ["a"] * 10}))
        options = {"allow": ("127.0.0.0/8",), **HASTY}
        for generation in range(3):
            manifest = make(store, download(web.port, retry_pass=generation, **options), listing)
            assert manifest.states == {"opt_out": 1, "connection": 9}
            assert manifest.only.generation == generation
        assert Counter(path for path, _, _ in web.seen) == {"/no.png": 1}
    assert "opt_out" not in PASSING


def test_what_was_forgotten_meanwhile_is_neither_asked_nor_kept(hasty: Any):
    store, listing, server = hasty
    before = [index.to_pylist() for index in indexes(store, make(store, download(server.port), listing))]
    number, failed = next((n, row) for n, rows in enumerate(before) for row in rows if row["state"] == "http_503")
    kept = next(row for row in before[number] if row["state"] == KEPT)
    add_request(store, Forgotten.of(ForgottenNames(uids=frozenset({kept["uid"], failed["uid"]})), url_salt(store)))
    server.attempts.clear()
    after = indexes(store, make(store, download(server.port, retry_pass=1), listing))[number].to_pylist()
    assert {row["state"] for row in after if row["uid"] in (kept["uid"], failed["uid"])} == {FORGOTTEN}
    assert urlsplit(failed["url"]).path not in server.attempts
    others = [row["uid"] for row in before[number] if row["state"] == KEPT and row is not kept]
    assert {row["uid"] for row in after if row["state"] == KEPT} >= {*others}
