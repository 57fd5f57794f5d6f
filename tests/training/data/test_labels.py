"""Labels find their rows by uid, whatever was filtered or reordered in between; classes come from the data alone."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from infra.documents import digest_file
from infra.errors import Refused
from infra.records.objects import object_name
from infra.store.base import Store
from infra.tracking.monitor import NullMonitor
from tests.fixtures.fits import Tiny, tiny
from training.data.batches import Data, Reads, picture
from training.data.labels import Labels, class_table, labelled
from training.data.order import Order
from training.job import FitHow
from training.launch import train_local
from training.objectives.choice import objective
from training.parallel.flat import Group
from unclip.files import read_json
from unclip.models.classifier import Classifier
from unclip.release.model import load_model

BOTH = Labels(("shade", "number"), (("dark", "light"), ("0", "5", "10")))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("tiny"))


def put(store: Store, columns: dict[str, pa.Array]) -> str:
    """An index object with uids "0…0", "1…1", … and those columns."""
    count = len(next(iter(columns.values())))
    uids = pa.array([bytes([48 + number]) * 16 for number in range(count)], pa.binary(16))
    with store.scratch() as folder:
        pq.write_table(pa.table({"uid": uids, **columns}), folder / "index.parquet")
        sha = digest_file(folder / "index.parquet")
        store.put_new(object_name(sha), folder / "index.parquet")
    return sha


def test_each_row_has_the_label_of_its_uid_and_its_own_picture(world: Tiny):
    """Embed has dropped every fifth row of the index, and curate every seventh of the rest; batches mix shards."""
    data = Data(world.store, world.embed, world.curate, Reads(labels=BOTH, image=lambda d, u: picture(d, u, size=16)))
    expected = {uid: world.labels[uid] for uid in world.kept if world.labels[uid] != (None, None)}
    assert sum(data.counts) == len(expected) < len(world.kept)
    rows = [(block, row) for block, count in enumerate(data.counts) for row in range(count)]
    batch = data.batch(list(np.random.default_rng(0).permutation(rows)), seed=0)
    assert sorted(batch.uids) == sorted(expected)
    assert batch.uids != list(expected)
    for uid, (shade, number), image in zip(
        batch.uids, batch.tensors["labels"].tolist(), batch.tensors["image"], strict=True
    ):
        assert (None if shade < 0 else BOTH.classes[0][shade]) == expected[uid][0]
        assert (None if number < 0 else int(BOTH.classes[1][number])) == expected[uid][1]
        if shade >= 0:  # the picture itself says the same
            assert shade == (np.asarray(image, float).mean() > 127.5)


def test_a_fit_without_labels_reads_all_rows(world: Tiny):
    assert sum(Data(world.store, world.embed, world.curate, Reads()).counts) == len(world.kept)


def test_integers_are_ordered_by_size_and_texts_by_their_characters(world: Tiny):
    index = put(world.store, {"n": pa.array([10, 9, -1, None, 9]), "s": pa.array(["b", "a", "", " ", "c"])})
    uids = [bytes([48 + number]) * 16 for number in range(5)]
    assert class_table(world.store, [(index, uids)], ("n", "s")) == (("-1", "9", "10"), ("a", "b", "c"))
    # Rows that are not trained on have no say, and blocks of one index add up.
    assert class_table(world.store, [(index, uids[:1]), (index, uids[1:2])], ("n", "s")) == (("9", "10"), ("a", "b"))
    assert labelled(world.store, index, ("s",)).to_pylist() == [uids[0], uids[1], uids[4]]


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("colour", pa.array(["a", "b"]), "'shape': the downloaded rows carry no such column"),
        ("shape", pa.array([0.5, 1.5]), "holds double; classes are texts or integers"),
        ("shape", pa.array(["one", "one"]), "has 1 classes"),
        ("shape", pa.nulls(2), "has 0 classes"),
        ("shape", pa.array(list(map(str, range(60)))), "has 60 classes"),
    ],
)
def test_a_column_that_is_no_label_is_refused(world: Tiny, column, values, reason, monkeypatch):
    monkeypatch.setattr("training.data.labels.MOST", 50)
    index = put(world.store, {column: values})
    uids = [bytes([48 + number]) * 16 for number in range(len(values))]
    with pytest.raises(Refused, match=reason):
        class_table(world.store, [(index, uids)], ("shape",))


def test_a_classifier_starts_at_chance_and_its_classes_are_the_datas(world: Tiny):
    task = objective(world.job("classifier", steps=1, batch=8), world.store, torch.device("cpu"))
    assert task.config.classes == BOTH.classes
    assert task.facts["classes"] == {"shade": 2, "number": 3}
    assert task.reads.labels == BOTH
    torch.manual_seed(0)
    data = Data(world.store, world.embed, world.curate, task.reads)
    batch = data.batch(Order(data.counts, 1, 64, 4, 0).rows(0, 0), seed=0)
    both = (batch.tensors["labels"] >= 0).all(1)
    loss = task.loss(task.build(), batch, Group()).loss.detach()
    assert float(loss[both].mean()) == pytest.approx(math.log(2) + math.log(3), abs=0.3)


def test_a_trained_classifier_is_the_same_bytes_each_time_and_carries_its_classes(world: Tiny, tmp_path: Path):
    for out in ("one", "two"):
        job = world.job("classifier", key=out, steps=2, batch=16, micro=8)
        train_local(job, FitHow(), world.store, tmp_path / out, NullMonitor())
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    model = load_model(tmp_path / "one", "classifier")
    assert isinstance(model, Classifier)
    assert (model.config.labels, model.config.classes) == (BOTH.columns, BOTH.classes)
    assert read_json(tmp_path / "one" / "config.json", "classifier")["clip"] is None


def test_a_noised_clip_belongs_to_the_clip_whose_texts_it_learned(world: Tiny, tmp_path: Path):
    facts = train_local(world.job("noised_clip", steps=2, batch=16), FitHow(), world.store, tmp_path, NullMonitor())
    task = objective(world.job("decoder", steps=1), world.store, torch.device("cpu"))
    assert read_json(tmp_path / "config.json", "CLIP")["clip"] == facts["clip"] == task.facts["clip"]
