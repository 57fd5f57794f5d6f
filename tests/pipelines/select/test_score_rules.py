"""Rules about what is seen: pictures and their embeddings."""

from __future__ import annotations

import io
import itertools

import faiss
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from infra.errors import Refused
from pipelines.select.rules import (
    Blank,
    Contamination,
    NearDuplicates,
    SemanticDuplicates,
    opened,
)
from pipelines.select.rules.base import DEVIATION, EMBEDDING, PHASH
from pipelines.select.rules.image import deviation, measured, phash
from pipelines.stage import plain
from tests.fixtures.rules import IMAGES, PICTURES, X, rejected


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


def embeddings(values: np.ndarray) -> pa.Table:
    flat = pa.array(values.astype(np.float32).reshape(-1))
    return pa.table({EMBEDDING: pa.FixedSizeListArray.from_arrays(flat, values.shape[1])})


def semantic(rule: SemanticDuplicates, *shards: np.ndarray) -> list[list[bool]]:
    return [verdict.tolist() for verdict in rule.reject(rule.features(embeddings(shard)) for shard in shards)]


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
    found = semantic(
        SemanticDuplicates(min_cosine=0.9, clusters=1), vectors[:7], vectors[7:7], vectors[7:1200], vectors[1200:]
    )
    assert [len(shard) for shard in found] == [7, 0, 1193, 300]
    flat = list(itertools.chain(*found))
    assert flat == greedy(vectors, 0.9)
    assert 100 < sum(flat) < 1490


def test_clusters_miss_few_semantic_duplicates_and_growth_changes_no_verdict():
    random = np.random.default_rng(1)
    vectors = random.normal(size=(300, 16))[random.integers(300, size=3000)] + random.normal(size=(3000, 16)) * 0.02
    rule = SemanticDuplicates(min_cosine=0.95, clusters=8)
    found = list(itertools.chain(*semantic(rule, *np.split(vectors, 3))))
    exact = greedy(vectors, 0.95)
    assert 0.97 * sum(exact) < sum(found) <= sum(exact)
    assert semantic(rule, vectors[:2100])[0] == found[:2100]  # 256 × 8 = 2048 rows teach the clusters


def test_semantic_duplicates_are_the_same_on_any_number_of_threads():
    random = np.random.default_rng(2)
    vectors = random.normal(size=(200, 16))[random.integers(200, size=1500)] + random.normal(size=(1500, 16)) * 0.1
    before, found = faiss.omp_get_max_threads(), []
    for threads in (1, 3):
        faiss.omp_set_num_threads(threads)
        found.append(semantic(SemanticDuplicates(min_cosine=0.9, clusters=5), vectors))
    faiss.omp_set_num_threads(before)
    assert found[0] == found[1]
    assert 0 < sum(found[0][0]) < 1500


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
