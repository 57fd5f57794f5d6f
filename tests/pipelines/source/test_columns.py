"""Layouts of public lists, with lists written as their publishers describe them."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from infra.errors import Refused
from infra.store.opening import open_store
from pipelines.recipe import schema as recipes
from pipelines.source.columns import LAYOUTS, columns_of
from pipelines.source.stage import SourceHow, SourceSpec
from pipelines.stage import plain
from tests.fixtures.samples import source_of, table_of
from tests.fixtures.stages import make

FACTS = {"url": "http://a.test/1.jpg", "text": "a cat"}
LISTS = {
    "laion": {
        "URL": FACTS["url"],
        "TEXT": FACTS["text"],
        "WIDTH": 9,
        "HEIGHT": 9,
        "similarity": 0.3,
        "hash": 1,
        "punsafe": 0.1,
        "pwatermark": 0.2,
    },
    "coyo": {
        "id": 1,
        **FACTS,
        "width": 9,
        "height": 9,
        "image_phash": "00",
        "clip_similarity_vitb32": 0.3,
        "clip_similarity_vitl14": 0.2,
        "nsfw_score_opennsfw2": 0.1,
        "nsfw_score_gantman": 0.1,
        "watermark_score": 0.1,
        "aesthetic_score_laion_v2": 5.0,
    },
    "datacomp": {
        "uid": "00",
        **FACTS,
        "original_width": 9,
        "original_height": 9,
        "clip_b32_similarity_score": 0.3,
        "clip_l14_similarity_score": 0.2,
        "face_bboxes": [[0.1, 0.2, 0.3, 0.4]],
        "sha256": "00",
    },
}


def rows_of(tmp_path, path, columns) -> list[dict[str, object]]:
    store = open_store(str(tmp_path / "store"))
    return table_of(store, make(store, source_of(SourceHow(str(path)), columns=columns)), "")


@pytest.mark.parametrize("layout", LISTS)
def test_a_list_of_a_known_layout_is_read_without_more_words(tmp_path, layout):
    pq.write_table(pa.Table.from_pylist([LISTS[layout]]), tmp_path / "list.parquet")
    (row,) = rows_of(tmp_path, tmp_path / "list.parquet", columns_of(layout, {}))
    assert (row["url"], row["caption"]) == (FACTS["url"], FACTS["text"])
    kept = LAYOUTS[layout].keep
    assert {name: row[name] for name in kept} == {name: LISTS[layout][name] for name in kept}
    assert kept


@pytest.mark.parametrize("first", ["", "url\tcaption\n"])
def test_cc12m_has_no_header_line_and_may_have_been_given_one(tmp_path, first):
    lines = "http://a.test/1.jpg\ta cat\nhttp://a.test/2.jpg\ta \u201cdog\u201d, with a comma\n"
    (tmp_path / "cc12m.tsv").write_text(first + lines)
    rows = rows_of(tmp_path, tmp_path / "cc12m.tsv", columns_of("cc12m", {}))
    assert [row["url"] for row in rows] == ["http://a.test/1.jpg", "http://a.test/2.jpg"]
    assert [row["caption"] for row in rows] == ["a cat", "a \u201cdog\u201d, with a comma"]


def test_what_the_recipe_says_wins_over_the_layout():
    recipe = recipes.load(
        "laion-art", ["source.layout=laion", "source.columns={caption: ALT, keep: [aesthetic]}", "source.urls=x"]
    )
    assert recipe.columns == columns_of(None, {"url": "URL", "caption": "ALT", "keep": ("aesthetic",)})


def test_a_layout_is_in_the_key_by_what_it_means():
    said = SourceSpec(columns_of(None, {"url": "URL", "caption": "TEXT", "keep": LAYOUTS["laion"].keep}))
    assert plain(SourceSpec(columns_of("laion", {}))) == plain(said)
    assert plain(SourceSpec()) == {"columns": {"url": "url", "caption": "caption", "keep": []}, "rows_per_shard": 1000}


def test_an_unknown_layout_is_refused_with_those_that_are_known():
    with pytest.raises(Refused, match=r"source.layout is 'layon'; known layouts: laion, coyo, cc12m, datacomp"):
        recipes.load("tiny", ["source.layout=layon"])
    with pytest.raises(Refused, match=r"source.columns.header must name each column once"):
        recipes.load("tiny", ["source.columns.header=[url, url]"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["source.tars=a.tar", "source.folder=b"], "source: tars and folder are given"),
        (["source.urls=a.csv", "source.tars=b.tar"], "source: urls and tars are given"),
        (["source.folder=''"], "source.urls is missing"),
        (["source.tar=a.tar"], "source.tar is no known key; did you mean 'tars'"),
    ],
)
def test_a_run_has_one_source(changes, message):
    with pytest.raises(Refused, match=message):
        recipes.load("tiny", changes)
