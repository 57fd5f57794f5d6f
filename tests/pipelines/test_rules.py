"""What each rule rejects."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file

from infra.errors import Refused
from pipelines.rules import (
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
from pipelines.rules.base import DEVIATION, EMBEDDING, PHASH
from pipelines.rules.picture import deviation, measured, phash
from pipelines.stage import plain

KINDS = {
    "sha256": pa.binary(32),
    "width": pa.int32(),
    "height": pa.int32(),
    "score": pa.float32(),
    "punsafe": pa.float64(),
    PHASH: pa.uint64(),
    DEVIATION: pa.float32(),
    EMBEDDING: pa.list_(pa.float32(), 4),
}


def rejected(rule: Rule, *shards: dict[str, list]) -> list[list[bool]]:
    """The rule's verdict over shards of rows."""
    tables = [
        pa.table({name: pa.array(values, KINDS.get(name, pa.string())) for name, values in shard.items()})
        for shard in shards
    ]
    return [verdict.tolist() for verdict in rule.reject(rule.look(table) for table in tables)]


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
def head(tmp_path: Path) -> str:
    """A linear head that scores an embedding by its first dimension, 0 … 10."""
    path = tmp_path / "head.safetensors"
    save_file({"weight": np.array([[5, 0, 0, 0]], np.float32), "bias": np.array([5], np.float32)}, path)
    return str(path)


@pytest.fixture
def every(tmp_path: Path, head: str) -> list[Rule]:
    """One of each rule, opened."""
    np.save(tmp_path / "set.npy", np.eye(4)[:2])
    rules = [
        Size(1), Aspect(2.0), Caption(), ExactDuplicates(), ClipScore(min_score=0.0), Blank(), Language(("en",)),
        BlockedTerms(terms=("bad",)), NearDuplicates(), Watermark(column="pwatermark", max_score=0.5),
        Nsfw(column="punsafe", max_score=0.5), Aesthetic(head=head, min_score=5.0), SemanticDuplicates(0.95),
        Contamination(embeddings=str(tmp_path / "set.npy")),
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
        assert rule.look(rows).nbytes <= 17 * 1000


def test_a_rule_that_was_opened_travels_and_decides_the_same(every):
    rows = {"caption": ["a bad thing", "good"], EMBEDDING: [[1, 0, 0, 0], [0, 0, 0, 1]], "pwatermark": ["1", "0"],
            "punsafe": [1.0, 0.0], "score": [1.0, -1.0], "sha256": [bytes(32)] * 2, "width": [1, 1], "height": [1, 9],
            PHASH: [1, 2], DEVIATION: [0, 9]}  # fmt: skip
    for rule in every:
        there = pickle.loads(pickle.dumps(rule))
        wanted = {column: rows[column] for column in rule.columns}
        assert rejected(there, wanted) == rejected(rule, wanted)


# Pictures -----------------------------------------------------------------------------------------------------------

Y, X = np.mgrid[0:96, 0:128]
PICTURES = {
    "waves": np.stack([127 + 120 * np.sin(X / 9 + Y / 17), 127 + 120 * np.cos(Y / 7), (X * 2 + Y) % 256], -1),
    "disc": np.where(((X - 40) ** 2 + (Y - 50) ** 2 < 700)[..., None], [220, 30, 40], [20, 60, 200]),
    "ramp": np.stack([X * 2, Y * 2, 255 - X], -1),
}
IMAGES = {name: Image.fromarray(array.clip(0, 255).astype(np.uint8)) for name, array in PICTURES.items()}


def test_the_perceptual_hash_is_that_of_imagehash():
    """imagehash 4.3.2, `imagehash.phash`."""
    found = {name: f"{phash(image):016x}" for name, image in IMAGES.items()}
    assert found == {"waves": "972df852f8d26892", "disc": "c4393bc0d8c7c63b", "ramp": "8022557f723a6677"}


@pytest.mark.parametrize("name", ["waves", "disc"])
def test_size_encoding_and_brightness_hardly_change_the_hash_and_another_picture_does(name):
    image = IMAGES[name]
    out = io.BytesIO()
    image.resize((200, 150)).point(lambda value: int(value * 0.9)).save(out, "JPEG", quality=60)
    again = Image.open(io.BytesIO(out.getvalue()))
    assert (phash(image) ^ phash(again)).bit_count() <= 4
    assert (phash(image) ^ phash(IMAGES["ramp"])).bit_count() > 16


def test_pictures_of_a_tar_are_measured_in_order_and_broken_ones_are_null():
    data = []
    for image in (IMAGES["disc"], Image.new("RGB", (40, 30), (9, 200, 30)), IMAGES["ramp"]):
        data.append(io.BytesIO())
        image.save(data[-1], "PNG")
    bodies = [data[0].getvalue(), b"no picture", data[1].getvalue(), data[2].getvalue()[:200]]
    lengths = [len(body) for body in bodies]
    rows = pa.table({"offset": np.cumsum([0, *lengths[:-1]]), "length": lengths})
    found = measured(rows, io.BytesIO(b"".join(bodies)), [DEVIATION, PHASH])
    assert found[PHASH].to_pylist() == [phash(IMAGES["disc"]), None, 1 << 63, None]
    spread = found[DEVIATION].to_pylist()
    assert spread[0] == pytest.approx(PICTURES["disc"].reshape(-1, 3).std(0).max(), rel=1e-5)
    assert spread[1:] == [None, 0, None]


def test_blank_pictures_go_however_they_are_coloured_and_unknown_ones_stay():
    assert deviation(Image.new("RGB", (5, 5), (1, 2, 3))) == 0
    equal_grey = Image.fromarray(np.where((X % 2 == 0)[..., None], [200, 0, 0], [0, 102, 0]).astype(np.uint8))
    assert deviation(equal_grey) == pytest.approx(100)
    assert rejected(Blank(min_deviation=2.0), {DEVIATION: [0.0, 1.9, 2.0, None]}) == [[True, True, False, False]]


def test_the_first_of_near_pictures_stays_and_those_without_a_hash():
    shards = {PHASH: [0, 0b111, 0b1111_1111]}, {PHASH: []}, {PHASH: [None, 1 << 63, None, 0b1111_1111, 2**64 - 1]}
    near = [[False, True, False], [], [False, True, False, True, False]]
    assert rejected(NearDuplicates(max_distance=3), *shards) == near
    exact = [[False, False, False], [], [False, False, False, True, False]]
    assert rejected(NearDuplicates(max_distance=0), *shards) == exact


# Captions -----------------------------------------------------------------------------------------------------------


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
    assert rejected(Language(("en",)), {"caption": said}) == [[False, True, True, False, False, False, False]]
    assert rejected(Language(("en", "de", "ko")), {"caption": said}) == [[False] * 7]
    sure = Language(("en",), unsure="reject")
    assert rejected(sure, {"caption": said}) == [[False, True, True, True, True, True, True]]
    with pytest.raises(Refused, match="xx is none of the languages"):
        Language(("en", "xx")).opened()


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


# Scores -------------------------------------------------------------------------------------------------------------


def test_scores_of_the_list_decide_and_unknown_ones_go_unless_told_otherwise():
    scores = [0.1, 0.5, 0.51, None, math.nan]
    assert rejected(Nsfw(column="punsafe", max_score=0.5), {"punsafe": scores}) == [[False, False, True, True, True]]
    keep = Nsfw(column="punsafe", max_score=0.5, unknown="keep")
    assert rejected(keep, {"punsafe": scores}) == [[False, False, True, False, False]]
    texts = {"pwatermark": ["0.1", "0.9", "much", "", None, " 5e-1 "]}
    assert rejected(Watermark(column="pwatermark", max_score=0.5), texts) == [[False, True, True, True, True, False]]
    assert rejected(Aesthetic(column="aesthetic", min_score=5), {"aesthetic": ["4.9", "5"]}) == [[True, False]]


def test_a_linear_head_scores_the_direction_of_an_embedding(head):
    rule = opened(Aesthetic(head=head, min_score=6.0))
    rows = {EMBEDDING: [[9, 0, 0, 0], [0.3, 0, 0, 0.4], [0.1, 0, 0, 0.9], [0, 0, 0, 0]]}  # 10, 8, 5.55, 5
    assert rejected(rule, rows) == [[False, False, True, True]]
    assert "head" not in plain(rule)
    assert len(plain(rule)["sha256"]) == 64
    wide = pa.table({EMBEDDING: pa.array([[1.0] * 8], pa.list_(pa.float32(), 8))})
    with pytest.raises(Refused, match="for embeddings of width 4, and CLIP's has 8"):
        rule.look(wide)


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


# Embeddings ---------------------------------------------------------------------------------------------------------


def embeddings(values: np.ndarray) -> pa.Table:
    flat = pa.array(values.astype(np.float32).reshape(-1))
    return pa.table({EMBEDDING: pa.FixedSizeListArray.from_arrays(flat, values.shape[1])})


def semantic(rule: SemanticDuplicates, *shards: np.ndarray) -> list[list[bool]]:
    return [verdict.tolist() for verdict in rule.reject(rule.look(embeddings(shard)) for shard in shards)]


def greedy(vectors: np.ndarray, least: float) -> list[bool]:
    """By comparing all with all, in the precision of looks: who has an equal before it that stays."""
    z = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float64)
    kept: list[int] = []
    for row in range(len(z)):
        if not (z[kept] @ z[row] >= least).any():
            kept.append(row)
    return [row not in kept for row in range(len(z))]


def test_with_one_cluster_semantic_duplicates_are_those_of_comparing_all_with_all():
    random = np.random.default_rng(0)
    vectors = random.normal(size=(60, 16))[random.integers(60, size=1500)] + random.normal(size=(1500, 16)) * 0.3
    found = semantic(SemanticDuplicates(0.9, clusters=1), vectors[:7], vectors[7:7], vectors[7:1200], vectors[1200:])
    assert [len(shard) for shard in found] == [7, 0, 1193, 300]
    flat = list(itertools.chain(*found))
    assert flat == greedy(vectors, 0.9)
    assert 100 < sum(flat) < 1490


def test_clusters_miss_few_semantic_duplicates_and_growth_changes_no_verdict():
    random = np.random.default_rng(1)
    vectors = random.normal(size=(300, 16))[random.integers(300, size=3000)] + random.normal(size=(3000, 16)) * 0.02
    rule = SemanticDuplicates(0.95, clusters=8)
    found = list(itertools.chain(*semantic(rule, *np.split(vectors, 3))))
    exact = greedy(vectors, 0.95)
    assert 0.97 * sum(exact) < sum(found) <= sum(exact)
    assert semantic(rule, vectors[:2100])[0] == found[:2100]  # 256 × 8 = 2048 rows teach the clusters


def test_an_evaluation_sets_pictures_go_however_they_were_encoded(tmp_path):
    folder = tmp_path / "set"
    (folder / "deep").mkdir(parents=True)
    IMAGES["disc"].save(folder / "a.png")
    IMAGES["waves"].resize((300, 200)).save(folder / "deep" / "b.jpg", quality=50)
    (folder / "notes.txt").write_text("no picture")
    hashed = {PHASH: [phash(IMAGES["disc"]), phash(IMAGES["ramp"]), None, phash(IMAGES["waves"])]}
    rule = opened(Contamination(images=str(folder)))
    assert rejected(rule, hashed, {PHASH: []}) == [[True, False, False, True], []]
    assert rejected(opened(Contamination(images=str(folder), max_distance=0)), hashed) == [[True, False, False, False]]
    (tmp_path / "list.txt").write_text("set/deep/b.jpg\n\nset/a.png\n")
    listed = opened(Contamination(images=str(tmp_path / "list.txt")))
    assert plain(listed) == plain(rule)
    assert rejected(listed, hashed) == [[True, False, False, True]]
    IMAGES["ramp"].save(folder / "c.png")
    with pytest.raises(Refused, match="changed while the run"):
        rejected(rule, hashed)
    (folder / "d.png").write_bytes(b"broken")
    with pytest.raises(Refused, match=r"d\.png is no picture"):
        rejected(opened(Contamination(images=str(folder))), hashed)
    for missing, said in (("gone", "cannot be read"), ("set/notes.txt", "is not there")):
        with pytest.raises(Refused, match=said):
            opened(Contamination(images=str(tmp_path / missing)))


def test_an_evaluation_sets_embeddings_reject_what_means_the_same(tmp_path):
    path = tmp_path / "set.npy"
    np.save(path, [[2.0, 0, 0, 0], [0, 3.0, 0, 0]])
    rule = opened(Contamination(embeddings=str(path), min_cosine=0.9))
    rows = {EMBEDDING: [[1, 0, 0, 0], [0, 1, 0.3, 0], [1, 1, 0, 0], [0, 0, 1, 0], [-1, 0, 0, 0], [0, 0, 0, 0]]}
    assert rejected(rule, rows) == [[True, True, False, False, False, False]]
    for wrong in (np.zeros(3), np.full((2, 2), np.nan), np.array([["a"]]), np.array([{}], object)):
        np.save(path, wrong, allow_pickle=True)
        with pytest.raises(Refused, match=r"set\.npy"):
            opened(Contamination(embeddings=str(path)))


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
