"""Mean, deviation and principal components of what is kept."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from infra.errors import Refused
from infra.records.commits import commit
from infra.records.manifest import Action, Manifest, Record
from infra.records.objects import object_name
from infra.records.schemas import KEPT, embedded_schema
from infra.store.base import Store
from infra.store.opening import open_store
from pipelines.embed.statistics import Statistics
from pipelines.select.rules import ClipScore
from pipelines.select.stage import FeatureStage, Select
from tests.fixtures.stages import make

WIDTH = 6


def shards(*sizes: int, seed: int = 0) -> list[pa.Table]:
    """Tables of correlated embeddings far from zero; every third row has a low score; one dimension is constant."""
    draw = np.random.default_rng(seed)
    mix = draw.normal(size=(WIDTH, WIDTH))
    tables, done = [], 0
    for size in sizes:
        image = (draw.normal(size=(size, WIDTH)) @ mix + 100).astype(np.float32)
        text = draw.normal(size=(size, WIDTH)).astype(np.float32)
        text[:, 0] = 0.5
        columns = {
            "uid": [hashlib.sha256(str(done + row).encode()).digest()[:16] for row in range(size)],
            "caption": ["x"] * size,
            "image_embedding": pa.FixedSizeListArray.from_arrays(pa.array(image.reshape(-1)), WIDTH),
            "text_embedding": pa.FixedSizeListArray.from_arrays(pa.array(text.reshape(-1)), WIDTH),
            "score": pa.array([0.1 if (done + row) % 3 == 0 else 0.4 for row in range(size)], pa.float32()),
            "image": [b""] * size,
            "url": [""] * size,
        }
        tables.append(pa.table(columns, schema=embedded_schema(WIDTH)))
        done += size
    return tables


def embed(store: Store, tables: list[pa.Table]) -> Manifest:
    records = []
    for number, table in enumerate(tables):
        action = Action("embed/1", {}, (str(number), str(table.num_rows)))
        with store.scratch() as out:
            pq.write_table(table, out / "rows.parquet", row_group_size=16)
            records.append(commit(store, action, Record.of(action, out, states={KEPT: table.num_rows}), out))
    manifest = Manifest(Action("embed/1", {}, ()), tuple(records))
    manifest.save(store)
    return manifest


def curate(store: Store, data: Manifest, *rules) -> Manifest:
    return make(store, Select("curate", rules), make(store, FeatureStage("curate", rules), data), data)


def tensors(store: Store, manifest: Manifest) -> dict[str, np.ndarray]:
    return load_file(store.local(object_name(manifest.only.sha("statistics.safetensors"))))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def test_they_are_those_of_the_rows_that_curate_keeps(store):
    tables = shards(50, 0, 33)
    data = embed(store, tables)
    made = make(store, Statistics(), data, curate(store, data, ClipScore(min_score=0.3)))
    got = tensors(store, made)
    joined = pa.concat_tables(tables)
    kept = np.asarray(joined["score"]) > 0.3
    image, text = (
        np.stack(joined[name].to_pylist()).astype(np.float64)[kept] for name in ("image_embedding", "text_embedding")
    )
    assert made.states == {"counted": int(kept.sum())}
    assert got["count"].tolist() == [kept.sum()]
    np.testing.assert_allclose(got["image_mean"], image.mean(0), rtol=1e-6)
    np.testing.assert_allclose(got["image_std"], image.std(0), rtol=1e-5)
    np.testing.assert_allclose(got["text_mean"], text.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got["text_std"][1:], text.std(0)[1:], rtol=1e-5)
    assert {name: value.dtype for name, value in got.items() if name != "count"} == {
        name: np.float32 for name in ("image_mean", "image_std", "text_mean", "text_std", "pca", "eigenvalues")
    }


def test_components_are_rows_by_falling_eigenvalue_that_decorrelate(store):
    tables = shards(400)
    data = embed(store, tables)
    got = tensors(store, make(store, Statistics(), data, curate(store, data)))
    image = np.stack(tables[0]["image_embedding"].to_pylist()).astype(np.float64)
    pca = got["pca"].astype(np.float64)
    np.testing.assert_allclose(pca @ pca.T, np.eye(WIDTH), atol=1e-5)
    assert (np.diff(got["eigenvalues"]) <= 0).all()
    turned = (image - image.mean(0)) @ pca.T
    np.testing.assert_allclose(turned.T @ turned / len(turned), np.diag(got["eigenvalues"]), atol=1e-3)
    assert (np.take_along_axis(pca, np.abs(pca).argmax(1)[:, None], 1) > 0).all()


def test_one_pass_gives_what_numpy_gives_over_all_rows_at_once(store):
    tables = shards(300, 7, 0, 1, 120)
    data = embed(store, tables)
    got = tensors(store, make(store, Statistics(), data, curate(store, data)))
    image = np.stack(pa.concat_tables(tables)["image_embedding"].to_pylist()).astype(np.float64)
    _, singular, components = np.linalg.svd(image - image.mean(0), full_matrices=False)
    np.testing.assert_allclose(got["eigenvalues"], singular**2 / len(image), rtol=1e-5)
    assert np.abs((got["pca"] * components).sum(1)).min() > 1 - 1e-6  # signs are a convention
    np.testing.assert_allclose(got["image_std"], image.std(0), rtol=1e-6)


def test_a_constant_dimension_gets_a_deviation_that_can_be_divided_by(store):
    data = embed(store, shards(20))
    got = tensors(store, make(store, Statistics(), data, curate(store, data)))
    assert got["text_std"][0] == pytest.approx(1e-6)
    assert got["text_mean"][0] == 0.5


def test_the_same_versions_give_the_same_bytes(store, tmp_path):
    data = embed(store, shards(40, 40))
    chosen = curate(store, data)
    made = make(store, Statistics(), data, chosen)
    (action,) = Statistics().actions(data, chosen)
    out = tmp_path / "out"
    out.mkdir()
    assert Statistics().run(action, store, out).files == made.only.files


def test_fewer_than_two_rows_are_refused(store):
    data = embed(store, shards(1))
    with pytest.raises(Refused, match="at least 2"):
        make(store, Statistics(), data, curate(store, data))
