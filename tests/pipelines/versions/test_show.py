"""What data a store holds, and the account of every row."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from infra.errors import Refused
from infra.records.manifest import Action, Manifest, Record
from infra.store.opening import open_store
from pipelines.embed.stage import Embed, EmbedSpec
from pipelines.engine.versions import reconcile
from pipelines.select.rules import ClipScore
from pipelines.select.stage import FeatureStage, Select
from pipelines.versions import show as versions
from tests.fixtures.stages import Data, clip, make


@pytest.fixture(scope="module")
def chain(data: Data) -> tuple[Manifest, ...]:
    """Source, download, filter, embed, curate."""
    embed = make(data.store, Embed(EmbedSpec(base=32, batch=16)), data.download, data.filter, clip(data.store))
    rules = (ClipScore(top_fraction=0.75),)
    looks = make(data.store, FeatureStage("curate", rules), embed)
    return data.source, data.download, data.filter, embed, make(data.store, Select("curate", rules), looks, embed)


def test_every_row_of_the_list_has_exactly_one_final_state(chain):
    final = reconcile(*chain)
    assert sum(final.values()) == chain[0].rows == 240
    assert final["kept"] == chain[-1].states["kept"]
    assert final["curate.clip_score"] == int(chain[3].rows * 0.25)
    assert {"download.http_404", "filter.exact_duplicates", "curate.clip_score", "kept"} <= set(final)
    assert min(final.values()) > 0


def test_versions_that_do_not_belong_together_are_refused(chain):
    source, download, filter, embed, curate = chain
    short = Manifest(download.action, download.records[:-1])
    with pytest.raises(Refused, match=r"download accounts for \d+ rows, and 240 were passed on"):
        reconcile(source, short, filter, embed, curate)
    with pytest.raises(Refused, match="curate accounts for"):
        reconcile(source, download, filter, embed, Manifest(curate.action, ()))


def test_versions_are_listed_with_their_rows_and_states(data: Data, chain):
    listed = {one.version: one for one in versions.list_versions(data.store)}
    for manifest in chain:
        one = listed[manifest.version]
        assert (one.rows, one.states, one.shards) == (manifest.rows, manifest.states, len(manifest.records))
    console = Console(width=200, record=True)
    console.print(versions.table(data.store))
    text = console.export_text()
    assert all(manifest.version[:12] in text for manifest in chain)


def test_one_version_shows_how_it_was_made_and_its_shards(data: Data, chain):
    shown = versions.show(data.store, chain[1].version[:10])
    assert shown["stage"] == "download/1"
    assert shown["states"] == chain[1].states
    assert shown["action"]["spec"]["size"] == 128
    assert [shard["rows"] for shard in shown["shards"]] == [record.rows for record in chain[1].records]
    assert shown["shards"][0]["files"]["images.tar"]["sha256"] == chain[1].records[0].sha("images.tar")
    json.dumps(shown)


def test_unknown_versions_are_refused(data: Data, chain, tmp_path):
    with pytest.raises(Refused, match="no version 'zz'"):
        versions.show(data.store, "zz")
    with pytest.raises(Refused, match="no version ''"):
        versions.show(data.store, "")
    with pytest.raises(Refused, match="no version"):
        versions.show(open_store(str(tmp_path / "store")), chain[0].version)


def test_ambiguous_versions_are_refused(tmp_path):
    store = open_store(str(tmp_path / "store"))
    for number in range(17):  # sixteen first digits: two of these begin alike
        Manifest(Action("x/1", {}, ()), (Record("", 0, {}, facts={"number": number}),)).save(store)
    firsts = [one.version[0] for one in versions.list_versions(store)]
    with pytest.raises(Refused, match="give more digits"):
        versions.show(store, max(firsts, key=firsts.count))
