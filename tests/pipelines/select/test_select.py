"""Which rows stay, and that growth leaves the verdicts on old rows as they were."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.errors import Refused
from infra.records.commits import commit
from infra.records.manifest import Action, Manifest, Record
from infra.records.objects import object_name
from infra.records.schemas import INDEX, KEPT, SELECTION
from infra.store.base import Store
from infra.store.opening import open_store
from pipelines.select.rules import Caption, ClipScore, ExactDuplicates, Size
from pipelines.select.stage import FeatureStage, Select, read_selection
from pipelines.shapes.links import parse_path
from pipelines.shapes.lists import write_list
from pipelines.shapes.server import serve
from tests.fixtures.stages import RULES, Data, download, make, source, todo

GOLDEN = "6ae3b0229e"


def downloaded(store: Store, *shards: list[tuple[str, int, str]]) -> Manifest:
    """A download manifest whose rows have these (state, side, caption); pictures are equal where captions begin so."""
    records = []
    for number, rows in enumerate(shards):
        action = Action("download/1", {}, (str(number), str(rows)))
        index = [
            {
                "uid": hashlib.sha256(f"{number} {place}".encode()).digest()[:16],
                "state": state,
                "caption": caption,
                "width": side,
                "height": side,
                "sha256": hashlib.sha256(caption.split()[0].encode()).digest(),
            }
            for place, (state, side, caption) in enumerate(rows)
        ]
        with store.scratch() as out:
            pq.write_table(pa.Table.from_pylist(index, schema=INDEX), out / "index.parquet")
            made = Record.of(action, out, states=Counter(row["state"] for row in index))
            records.append(commit(store, action, made, out))
    return Manifest(Action("download/1", {}, ()), tuple(records))


def verdicts(store: Store, data: Manifest, selection: Manifest, file: str = "index.parquet") -> list[list[str | None]]:
    names = [f"{record.sha(file)}.parquet" for record in data.records]
    assert set(selection.only.files) == set(names)
    return [pq.read_table(store.local(object_name(selection.only.sha(name))))["rule"].to_pylist() for name in names]


def choose(store: Store, data: Manifest, *rules) -> Manifest:
    return make(store, Select("filter", rules), make(store, FeatureStage("filter", rules), data), data)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def test_a_row_is_marked_with_the_first_rule_that_rejects_it(store):
    data = downloaded(store, [(KEPT, 100, "a b c"), (KEPT, 10, "x"), ("http_404", 1, "gone"), (KEPT, 100, "y")])
    rules = Size(min_side=64), Caption(min_words=2)
    assert verdicts(store, data, choose(store, data, *rules)) == [[None, "size", "caption"]]
    assert verdicts(store, data, choose(store, data, *reversed(rules))) == [[None, "caption", "caption"]]


def test_a_rejected_row_is_not_the_one_that_later_rules_prefer(store):
    data = downloaded(store, [(KEPT, 100, "same"), (KEPT, 100, "same but said in more words")])
    rules = Caption(min_words=2), ExactDuplicates()
    assert verdicts(store, data, choose(store, data, *rules)) == [["caption", None]]


def test_states_account_for_every_kept_row_and_selections_name_them(store):
    data = downloaded(store, [(KEPT, 100, "a b"), (KEPT, 9, "c d")], [("timeout", 1, "gone")], [(KEPT, 100, "a too")])
    selection = choose(store, data, Size(min_side=64), ExactDuplicates())
    assert selection.states == {KEPT: 1, "size": 1, "exact_duplicates": 1}
    assert selection.rows == data.states[KEPT] == 3
    for record in data.records:
        index = pq.read_table(store.local(object_name(record.sha("index.parquet"))))
        sha = selection.only.sha(f"{record.sha('index.parquet')}.parquet")
        made = pq.read_table(store.local(object_name(sha)))
        assert made.schema.equals(SELECTION)
        kept = [row["uid"] for row in index.to_pylist() if row["state"] == KEPT]
        assert made["uid"].to_pylist() == kept
        stays = [uid for uid, rule in zip(kept, made["rule"].to_pylist(), strict=True) if rule is None]
        assert read_selection(store, sha).to_pylist() == stays


def test_without_rules_every_row_stays(store):
    data = downloaded(store, [(KEPT, 1, "a"), (KEPT, 1, "a")])
    assert choose(store, data).states == {KEPT: 2}


def test_growth_leaves_old_selections_byte_equal(store):
    first = [(KEPT, 100, "a b"), (KEPT, 100, "c d"), (KEPT, 10, "e f")]
    second = [(KEPT, 100, "a too"), (KEPT, 100, "g h")]
    rules = Size(min_side=64), Caption(min_words=2), ExactDuplicates()
    before = choose(store, downloaded(store, first, second), *rules).only
    after = choose(store, downloaded(store, first, second, [(KEPT, 100, "c again"), (KEPT, 99, "z z")]), *rules).only
    assert before.files.items() < after.files.items()
    assert after.states == {KEPT: 4, "size": 1, "exact_duplicates": 2}


def test_a_longer_list_downloads_the_new_slices_and_keeps_all_other_selections(tmp_path):
    store = open_store(str(tmp_path / "store"))
    made = []
    with serve(slow=0.0) as server:
        for rows in (200, 220):
            write_list(tmp_path / "list.parquet", rows, seed=0)
            listed = make(store, source(tmp_path / "list.parquet", 30))
            new = todo(store, download(server.port), listed)
            fetched = make(store, download(server.port), listed)
            looks_to_do = todo(store, FeatureStage("filter", RULES), fetched)
            made.append((fetched, choose(store, fetched, *RULES), new, looks_to_do))
    (before, old, _, _), (after, grown, new, looks) = made
    assert 1 <= new <= 3
    assert looks == new
    assert len(after.records) > 5
    untouched = {f"{record.sha('index.parquet')}.parquet" for record in before.records} & set(grown.only.files)
    assert len(untouched) >= len(before.records) - 2
    assert all(old.only.files[name] == grown.only.files[name] for name in untouched)


def test_duplicates_of_the_world_are_rejected_and_its_other_good_rows_stay(data: Data):
    rules = dict.fromkeys(["size", "aspect", "caption"], 0) | data.filter.states
    assert rules["size"] == rules["aspect"] == rules["caption"] == 0
    assert data.filter.rows == data.download.states[KEPT]
    duplicates = 0
    for record, marks in zip(data.download.records, verdicts(data.store, data.download, data.filter), strict=True):
        index = pq.read_table(data.store.local(object_name(record.sha("index.parquet")))).to_pylist()
        kept = [row["url"] for row in index if row["state"] == KEPT]
        for url, mark in zip(kept, marks, strict=True):
            if mark is not None:
                assert parse_path(urlsplit(url).path).fault == "duplicate"
                duplicates += 1
    assert duplicates == data.filter.states["exact_duplicates"] > 0


def test_looks_of_shards_that_are_known_are_not_done_again(store):
    one, two = [(KEPT, 100, "a b")], [(KEPT, 100, "c d")]
    choose(store, downloaded(store, one), Size(min_side=64))
    assert todo(store, FeatureStage("filter", (Size(min_side=64),)), downloaded(store, one, two)) == 1
    assert todo(store, FeatureStage("filter", (Size(min_side=65),)), downloaded(store, one)) == 1


def test_when_nothing_stays_the_rules_that_took_it_are_named(store):
    data = downloaded(store, [(KEPT, 10, "a b"), (KEPT, 100, "c")])
    with pytest.raises(Refused, match=r"of the 2 rows of download none stays \(caption 1, size 1\)"):
        choose(store, data, Size(min_side=64), Caption(min_words=2))
    with pytest.raises(Refused, match=r"filter: download kept no row \(http_404 1\)"):
        choose(store, downloaded(store, [("http_404", 1, "gone")]))


def test_rules_in_the_wrong_place_or_twice_are_refused():
    with pytest.raises(Refused, match=r"clip_score reads score, which .* put it under curate\.rules"):
        FeatureStage("filter", (ClipScore(min_score=0.2),))
    with pytest.raises(Refused, match=r"exact_duplicates reads sha256, .* put it under filter\.rules"):
        Select("curate", (ExactDuplicates(),))
    with pytest.raises(Refused, match="'size' twice"):
        FeatureStage("filter", (Size(min_side=1), Size(min_side=2)))


def test_the_stages_are_named_as_the_graph_needs_them():
    assert [(s.name, s.group, s.needs, s.kind) for s in (FeatureStage("curate"), Select("curate"))] == [
        ("curate-look", "curate", ("embed",), "task"),
        ("curate", "curate", ("curate-look", "embed"), "driver"),
    ]


def test_the_selections_of_version_1_keep_their_bytes(store):
    data = downloaded(store, [(KEPT, 100, "a b c"), (KEPT, 10, "x"), (KEPT, 100, "a")])
    rules = Size(min_side=64), Caption(min_words=2), ExactDuplicates()
    looks = make(store, FeatureStage("filter", rules), data)
    made = make(store, Select("filter", rules), looks, data)
    shas = looks.only.sha("look.parquet") + "".join(file.sha256 for file in made.only.files.values())
    total = hashlib.sha256(shas.encode()).hexdigest()
    assert (Select("filter").version, total[:10]) == (1, GOLDEN), "raise _Selecting.version when its bytes change"
