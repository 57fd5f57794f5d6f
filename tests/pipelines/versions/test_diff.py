"""A difference is what it takes to come from one version to the other, and nothing more."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.errors import Refused
from infra.records.commits import commit
from infra.records.forgotten import Forgotten, add_request, url_salt
from infra.records.manifest import Action, Manifest, Record
from infra.records.schemas import UID
from infra.store.base import Store
from infra.store.opening import open_store
from pipelines.versions import diff as data_diff
from pipelines.versions.diff import Difference, as_json, as_text, diff
from pipelines.versions.forget import ForgottenNames, forget
from pipelines.versions.verify import lose
from tests.fixtures.chain import Chain, run
from tests.fixtures.stages import Data

Row = tuple[int, str]
SHARDS = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["kept", "http_404", "timeout"])), min_size=1, max_size=6),
    max_size=4,
)


def uid(number: int) -> bytes:
    return bytes([number * 25]) + bytes([number]) * 15


def version(store: Store, shards: list[list[Row]], **spec: object) -> str:
    """A version of these shards of rows."""
    records = []
    for number, rows in enumerate(shards):
        action = Action("made/1", {**spec, "number": number, "rows": rows}, ())
        with store.scratch() as out:
            columns = [[uid(name) for name, _ in rows], [state for _, state in rows]]
            schema = pa.schema([("uid", UID), ("state", pa.string())])
            pq.write_table(pa.table(columns, schema=schema), out / "index.parquet")
            states = Counter(state for _, state in rows)
            records.append(commit(store, action, Record.of(action, out, states=dict(states)), out))
    return Manifest(Action("made/1", {**spec}, (json.dumps(shards),)), tuple(records)).save(store)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(str(tmp_path_factory.mktemp("diff") / "store"))


def only(store: Store, a: str, b: str, rows: Path | None = None) -> Difference:
    (found,) = diff(store, a, b, rows)
    return found


@pytest.mark.parametrize("part_rows", [1, 1_000_000])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=SHARDS, after=SHARDS)
def test_a_difference_leads_from_one_to_the_other_and_back(
    store: Store, monkeypatch: pytest.MonkeyPatch, part_rows: int, before: list[list[Row]], after: list[list[Row]]
) -> None:
    monkeypatch.setattr(data_diff, "PART_ROWS", part_rows)
    a, b = version(store, before), version(store, after)
    path = Path(store.uri) / "rows.parquet"
    found, back = only(store, a, b, path), only(store, b, a)
    rows = Counter((uid(name), state) for shard in before for name, state in shard)
    for row in pq.read_table(path).to_pylist():
        assert row["before"] != row["after"]
        if row["before"] is not None:
            assert rows[row["uid"], row["before"]] > 0
            rows[row["uid"], row["before"]] -= 1
        if row["after"] is not None:
            rows[row["uid"], row["after"]] += 1
    assert +rows == Counter((uid(name), state) for shard in after for name, state in shard)
    assert (back.added, back.removed) == (found.removed, found.added)
    assert back.changed == Counter({(now, was): count for (was, now), count in found.changed.items()})
    # The least that leads there: a uid is added or removed, never both.
    signs: dict[bytes, set[bool]] = {}
    for row in pq.read_table(path).to_pylist():
        if None in (row["before"], row["after"]):
            signs.setdefault(row["uid"], set()).add(row["before"] is None)
    assert all(len(sign) == 1 for sign in signs.values())
    assert found.rows[0] - found.removed.total() + found.added.total() == found.rows[1]
    assert not any((only(store, a, a).added, only(store, a, a).removed, only(store, a, a).changed))


def test_shared_shards_are_not_read(store: Store) -> None:
    same, old, new = [(1, "kept"), (2, "kept")], [(3, "timeout"), (4, "kept")], [(3, "kept"), (5, "kept")]
    a, b = version(store, [same, old]), version(store, [same, new])
    found = only(store, a, b)
    assert found.shards == {"shared": 1, "removed": 1, "new": 1}
    assert (found.added, found.removed, found.changed) == ({"kept": 1}, {"kept": 1}, {("timeout", "kept"): 1})
    shared = next(iter(Manifest.load(store, a).records[0].files.values()))
    store.delete(f"objects/{shared.sha256[:2]}/{shared.sha256}")
    assert only(store, a, b) == found


def test_settings_are_compared(store: Store) -> None:
    a, b = version(store, [[(1, "kept")]], side=64), version(store, [[(1, "kept"), (2, "kept")]], side=128)
    assert only(store, a, b).settings == ["side 64 → 128"]


def test_the_stages_of_a_run_are_compared_by_row(chain: Chain, data: Data, tmp_path: Path) -> None:
    """The other run obeys a list of forgotten samples, which this one, made before, did not have."""
    own = chain.copy(tmp_path / "store")
    row = next(row for row in own.index() if row["uid"] in own.stays("curate"))
    add_request(own.store, Forgotten(uids=frozenset({row["uid"]})))
    url_salt(own.store)
    for entry in list(own.store.list("records/download-1/")):
        lose(own.store, entry.name)
    made = run(own.store, data, own.made["source"])

    def compared(stage: str) -> Difference:
        return only(own.store, own.made[stage].version, made[stage].version, tmp_path / f"{stage}.parquet")

    assert compared("download").changed == {("kept", "forgotten"): 1}
    (changed,) = pq.read_table(tmp_path / "download.parquet").to_pylist()
    assert changed == {"uid": row["uid"], "before": "kept", "after": "forgotten"}
    assert "kept → forgotten 1" in as_text(compared("download"))
    embed = compared("embed")
    assert (embed.removed, embed.added, embed.changed) == ({"kept": 1}, {}, {})
    assert embed.shards["new"] == embed.shards["removed"] == 1
    assert compared("filter").rows[1] == compared("filter").rows[0] - 1
    json.dumps(as_json(compared("download")))


def test_what_is_gone_with_forgotten_samples_is_said(chain: Chain, data: Data, tmp_path: Path) -> None:
    own = chain.copy(tmp_path / "store")
    forget(own.store, ForgottenNames(uids=frozenset({next(iter(own.stays("curate")))})))
    made = run(own.store, data, own.made["source"])
    found = only(own.store, own.made["download"].version, made["download"].version)
    assert found.forgotten == (1, 0)
    assert "held forgotten samples (1 of the first" in as_text(found)


def test_two_releases_are_compared_stage_by_stage(chain: Chain) -> None:
    found = diff(chain.store, chain.release, chain.release)
    assert {one.stage for one in found} == set(chain.made)
    assert all(one.empty and as_text(one).endswith("the same") for one in found)


def test_versions_of_different_stages_are_refused(chain: Chain) -> None:
    with pytest.raises(Refused, match="compare two of the same stage"):
        diff(chain.store, chain.made["download"].version, chain.made["embed"].version)
    with pytest.raises(Refused, match="no version 'zz'"):
        diff(chain.store, "zz", chain.made["embed"].version)
