"""What each rule rejects, and what all rules have in common."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import Refused
from pipelines.select.rules import (
    RULES,
    Aesthetic,
    Aspect,
    Blank,
    BlockedTerms,
    Caption,
    ClipScore,
    Contamination,
    ExactDuplicates,
    Language,
    NearDuplicates,
    Nsfw,
    Rule,
    SemanticDuplicates,
    Size,
    Watermark,
    opened,
)
from pipelines.select.rules.base import DEVIATION, EMBEDDING, PHASH
from tests.fixtures.rules import linear_head, rejected


def test_size_is_of_the_shorter_side_of_the_original():
    rows = {"width": [64, 63, 200, 10], "height": [64, 200, 63, 10]}
    assert rejected(Size(min_side=64), rows) == [[False, True, True, True]]


def test_aspect_is_the_same_lying_and_standing():
    rows = {"width": [100, 200, 100, 201], "height": [100, 100, 201, 100]}
    assert rejected(Aspect(max_ratio=2.0), rows) == [[False, False, True, True]]


def test_captions_are_measured_without_the_blanks_around_them():
    rows = {"caption": ["a red circle", "  a red  ", "", "one two three four five", "x" * 40]}
    assert rejected(Caption(min_words=2), rows) == [[False, False, True, False, True]]
    assert rejected(Caption(min_words=0, min_characters=6), rows) == [[False, True, True, False, False]]
    assert rejected(Caption(min_words=0, min_characters=0, max_words=4), rows) == [[False, False, False, True, False]]
    assert rejected(Caption(max_characters=30), rows) == [[False, False, True, False, True]]


def test_of_equal_pictures_the_first_in_the_manifest_stays_whatever_its_caption():
    one, two = b"1" * 32, b"2" * 32
    assert rejected(ExactDuplicates(), {"sha256": [one, two, one]}, {"sha256": []}, {"sha256": [two, b"3" * 32]}) == [
        [False, False, True],
        [],
        [True, False],
    ]


def test_a_score_is_enough_or_it_is_not():
    rows = {"score": [0.3, 0.25, 0.24999, None, math.nan]}
    assert rejected(ClipScore(min_score=0.25), rows) == [[False, False, True, True, True]]


def test_the_top_fraction_is_of_all_shards_together_and_equals_stay_by_order():
    shards = {"score": [0.1, 0.5, 0.5]}, {"score": []}, {"score": [0.9, 0.5, math.nan]}
    assert rejected(ClipScore(top_fraction=0.5), *shards) == [[True, False, False], [], [False, True, True]]
    assert rejected(ClipScore(top_fraction=1.0), *shards) == [[False] * 3, [], [False] * 3]
    assert rejected(ClipScore(top_fraction=0.5)) == []


scores = st.lists(st.lists(st.floats(-1, 1, width=32), max_size=8), max_size=5)


@settings(deadline=None)
@given(scores, st.floats(0.01, 1))
def test_the_top_fraction_keeps_the_highest(shards, fraction):
    verdicts = rejected(ClipScore(top_fraction=fraction), *({"score": shard} for shard in shards))
    flat, gone = [s for shard in shards for s in shard], [r for verdict in verdicts for r in verdict]
    assert [len(verdict) for verdict in verdicts] == [len(shard) for shard in shards]
    kept = [score for score, no in zip(flat, gone, strict=True) if not no]
    assert len(kept) == math.ceil(fraction * len(flat))
    assert max((score for score, no in zip(flat, gone, strict=True) if no), default=-2) <= min(kept, default=2)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=6), st.lists(st.integers(0, 9), max_size=6))
def test_growth_changes_no_verdict_of_duplicates(shards, more):
    digests = [{"sha256": [bytes([number]) * 32 for number in shard]} for shard in [*shards, more]]
    assert rejected(ExactDuplicates(), *digests)[: len(shards)] == rejected(ExactDuplicates(), *digests[:-1])


@pytest.fixture
def every(tmp_path: Path) -> list[Rule]:
    """One of each rule, opened."""
    np.save(tmp_path / "set.npy", np.eye(4)[:2])
    rules = [
        Size(min_side=1), Aspect(max_ratio=2.0), Caption(), ExactDuplicates(), ClipScore(min_score=0.0), Blank(),
        Language(languages=("en",)),
        BlockedTerms(terms=("bad",)), NearDuplicates(), Watermark(column="pwatermark", max_score=0.5),
        Nsfw(column="punsafe", max_score=0.5), Aesthetic(head=linear_head(tmp_path), min_score=5.0),
        SemanticDuplicates(min_cosine=0.95), Contamination(embeddings=str(tmp_path / "set.npy")),
    ]  # fmt: skip
    assert {type(rule) for rule in rules} == set(RULES)
    return [opened(rule) for rule in rules]


def test_every_rule_looks_at_an_empty_shard_and_at_none(every):
    for rule in every:
        assert rejected(rule, {column: [] for column in rule.columns}) == [[]]
        assert rejected(rule) == []


def test_no_rule_stumbles_over_rows_of_nulls(every):
    for rule in every:
        if not {*rule.columns} & {"width", "height", "sha256", EMBEDDING}:  # these are never null in a kept row
            assert len(rejected(rule, {column: [None, None] for column in rule.columns})[0]) == 2


def test_looks_are_a_few_bytes_a_row(every):
    rows = pa.table(
        {
            "width": pa.array(range(1, 1001), pa.int32()),
            "height": pa.array(range(1, 1001), pa.int32()),
            "caption": ["a long caption " * 20] * 1000,
            "sha256": pa.array([bytes(32)] * 1000, pa.binary(32)),
            "score": pa.array(np.zeros(1000), pa.float32()),
            "pwatermark": ["0.25"] * 1000,
            "punsafe": pa.array(np.zeros(1000)),
            PHASH: pa.array(np.zeros(1000, np.uint64)),
            DEVIATION: pa.array(np.zeros(1000, np.float32)),
            EMBEDDING: pa.FixedSizeListArray.from_arrays(pa.array(np.ones(4000, np.float32)), 4),
        }
    )
    for rule in every:
        assert rule.features(rows).nbytes <= 17 * 1000


def test_a_rule_that_was_opened_travels_and_decides_the_same(every):
    rows = {"caption": ["a bad thing", "good"], EMBEDDING: [[1, 0, 0, 0], [0, 0, 0, 1]], "pwatermark": ["1", "0"],
            "punsafe": [1.0, 0.0], "score": [1.0, -1.0], "sha256": [bytes(32)] * 2, "width": [1, 1], "height": [1, 9],
            PHASH: [1, 2], DEVIATION: [0, 9]}  # fmt: skip
    for rule in every:
        there = pickle.loads(pickle.dumps(rule))
        wanted = {column: rows[column] for column in rule.columns}
        assert rejected(there, wanted) == rejected(rule, wanted)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (Size, {"min_side": 0}),
        (Aspect, {"max_ratio": 0.5}),
        (Aspect, {"max_ratio": math.nan}),
        (Caption, {"min_words": 5, "max_words": 4}),
        (Caption, {"min_characters": -1}),
        (ClipScore, {}),
        (ClipScore, {"min_score": 0.2, "top_fraction": 0.5}),
        (ClipScore, {"min_score": 25.0}),
        (ClipScore, {"top_fraction": 0.0}),
        (ClipScore, {"min_score": math.nan}),
        (Blank, {"min_deviation": -1.0}),
        (Blank, {"min_deviation": 200.0}),
        (Language, {"languages": ()}),
        (Language, {"languages": ("english",)}),
        (Language, {"languages": ("en",), "min_confidence": 1.5}),
        (BlockedTerms, {}),
        (BlockedTerms, {"terms": ("+-",)}),
        (BlockedTerms, {"terms": ("x",), "sha256": "0" * 64}),
        (NearDuplicates, {"max_distance": 9}),
        (NearDuplicates, {"max_distance": -1}),
        (Watermark, {"max_score": 0.5}),
        (Nsfw, {"max_score": 0.5, "column": "a", "head": "b"}),
        (Nsfw, {"max_score": 0.5, "column": ""}),
        (Nsfw, {"max_score": 0.5, "column": "a", "sha256": "0" * 64}),
        (Aesthetic, {"min_score": math.nan, "column": "a"}),
        (SemanticDuplicates, {"min_cosine": 1.5}),
        (SemanticDuplicates, {"min_cosine": 0.9, "clusters": 0}),
        (Contamination, {}),
        (Contamination, {"images": "a", "embeddings": "b"}),
        (Contamination, {"images": "a", "max_distance": 65}),
    ],
)
def test_impossible_rules_are_refused(rule, options):
    with pytest.raises(Refused, match="rule "):
        rule(**options)
