"""Rules about what is said of a picture: captions, and scores that somebody gave it."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save_file

from infra.errors import Refused
from pipelines.select.rules import (
    Aesthetic,
    BlockedTerms,
    Language,
    Nsfw,
    Watermark,
    opened,
)
from pipelines.select.rules.base import EMBEDDING
from pipelines.stage import plain
from tests.fixtures.rules import linear_head, rejected


def test_captions_of_other_languages_go_and_those_one_cannot_tell_stay():
    said = [
        "a photo of a dog on the beach",
        "ein roter Kreis auf grünem Grund",
        "빨간 자동차",
        "dog",
        "",
        None,
        "1234 !",
    ]
    assert rejected(Language(languages=("en",)), {"caption": said}) == [[False, True, True, False, False, False, False]]
    assert rejected(Language(languages=("en", "de", "ko")), {"caption": said}) == [[False] * 7]
    sure = Language(languages=("en",), unsure="reject")
    assert rejected(sure, {"caption": said}) == [[False, True, True, True, True, True, True]]
    with pytest.raises(Refused, match="xx is none of the languages"):
        Language(languages=("en", "xx")).opened()


@pytest.mark.parametrize(
    ("term", "caption", "holds"),
    [
        ("cafe", "Un CAFÉ, s'il vous plaît", True),
        ("café", "the cafe", True),
        ("cafe", "cafes of Paris", False),
        ("cafe", "café", True),
        ("ass", "a classic assembly", False),
        ("new york", "New-York; at night", True),
        ("new york", "York, new", False),
        ("new york", "a new\tyork", True),
        ("straße", "STRASSE", True),
        ("ａｂｃ", "abc", True),
        ("İstanbul", "istanbul", True),
        ("裸", "一张裸体照片", True),
        ("หมา", "รูปหมาน้อย", True),
        ("18+", "aged 18+", True),
        ("18+", "2018", False),
        ("x", "", False),
        ("x", None, False),
    ],
)
def test_terms_are_found_as_words_in_any_spelling(term, caption, holds):
    assert rejected(BlockedTerms(terms=(term,)), {"caption": [caption]}) == [[holds]]


def test_terms_of_a_file_count_as_those_of_the_recipe_and_its_digest_is_in_the_key(tmp_path):
    path, moved = tmp_path / "terms.txt", tmp_path / "moved.txt"
    path.write_text("\ufeff# not these\n\nred circle\n  blue\n")
    moved.write_bytes(path.read_bytes())
    rule = opened(BlockedTerms(terms=("green",), file=str(path)))
    said = ["one Red Circle", "a red square", "BLUE", "green", "not these"]
    assert rejected(rule, {"caption": said}) == [[True, False, True, True, False]]
    key = plain(rule)
    assert key == plain(opened(BlockedTerms(terms=("green",), file=str(moved))))
    assert key == {"terms": ["green"], "rule": "blocked_terms", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    moved.write_text("yellow")
    assert plain(opened(BlockedTerms(terms=("green",), file=str(moved)))) != key
    with pytest.raises(Refused, match="it is another file"):
        opened(BlockedTerms(file=str(moved), sha256=key["sha256"]))
    for text, said in ((b"# none\n", "has no term"), (b"\xff\xfe", "is no text in UTF-8")):
        path.write_bytes(text)
        with pytest.raises(Refused, match=said):
            opened(BlockedTerms(file=str(path)))
    with pytest.raises(Refused, match="No such file"):
        opened(BlockedTerms(file=str(tmp_path / "gone")))


def test_scores_of_the_list_decide_and_unknown_ones_go_unless_told_otherwise():
    scores = [0.1, 0.5, 0.51, None, math.nan]
    assert rejected(Nsfw(column="punsafe", max_score=0.5), {"punsafe": scores}) == [[False, False, True, True, True]]
    keep = Nsfw(column="punsafe", max_score=0.5, unknown="keep")
    assert rejected(keep, {"punsafe": scores}) == [[False, False, True, False, False]]
    texts = {"pwatermark": ["0.1", "0.9", "much", "", None, " 5e-1 "]}
    assert rejected(Watermark(column="pwatermark", max_score=0.5), texts) == [[False, True, True, True, True, False]]
    assert rejected(Aesthetic(column="aesthetic", min_score=5), {"aesthetic": ["4.9", "5"]}) == [[True, False]]


def test_a_linear_head_scores_the_direction_of_an_embedding(tmp_path):
    rule = opened(Aesthetic(head=linear_head(tmp_path), min_score=6.0))
    rows = {EMBEDDING: [[9, 0, 0, 0], [0.3, 0, 0, 0.4], [0.1, 0, 0, 0.9], [0, 0, 0, 0]]}  # 10, 8, 5.55, 5
    assert rejected(rule, rows) == [[False, False, True, True]]
    assert "head" not in plain(rule)
    assert len(plain(rule)["sha256"]) == 64
    wide = pa.table({EMBEDDING: pa.array([[1.0] * 8], pa.list_(pa.float32(), 8))})
    with pytest.raises(Refused, match="for embeddings of width 4, and CLIP's has 8"):
        rule.features(wide)


def test_what_is_no_head_is_refused_before_anything_starts(tmp_path):
    path = tmp_path / "head.safetensors"
    for tensors in ({"w": np.ones(3)}, {"weight": np.ones((2, 3)), "bias": np.ones(2)},
                    {"weight": np.array([np.nan]), "bias": np.ones(1)}):  # fmt: skip
        save_file(tensors, path)
        with pytest.raises(Refused, match="weight"):
            opened(Nsfw(head=str(path), max_score=0.0))
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(Refused, match="is no safetensors file"):
        opened(Nsfw(head=str(path), max_score=0.0))
