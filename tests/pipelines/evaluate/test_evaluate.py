"""A release is drawn, judged and measured; the numbers are those of the pictures that are kept."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import pipelines.evaluate
from infra.errors import Refused
from infra.records.manifest import Manifest
from infra.records.objects import object_name
from infra.store.base import Store
from infra.store.opening import open_store
from pipelines.evaluate import grids, scores
from pipelines.evaluate.prompts import Prompt
from pipelines.evaluate.stage import Evaluate, EvaluateSample, EvaluateSpec
from pipelines.release.open import open_release
from pipelines.shapes.oracle import judge
from pipelines.shapes.world import prompts
from pipelines.stage import PoolHow
from tests.fixtures.release import bundle
from tests.fixtures.stages import make, todo
from unclip import UnCLIP
from unclip.metrics import cosine

SPEC = EvaluateSpec("pipelines.shapes.oracle:judge", "pipelines.shapes.world:true_pictures", chunk=5, tile=4, seed=3)
ASKED = tuple(Prompt(**one) for kind in ("single", "pair") for one in prompts(kind, 6, seed=1))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield open_store(str(folder / "store"))


@pytest.fixture(scope="module")
def released(store: Store) -> Manifest:
    return bundle(store)


@pytest.fixture(scope="module")
def sampled(store: Store, released: Manifest) -> Manifest:
    return make(store, EvaluateSample(SPEC, PoolHow(), ASKED), released)


@pytest.fixture(scope="module")
def rows(store: Store, sampled: Manifest) -> list[dict]:
    tables = [pq.read_table(store.local(object_name(one.sha("samples.parquet")))) for one in sampled.records]
    return pa.concat_tables(tables).to_pylist()


def test_every_prompt_has_one_row_in_its_order(sampled: Manifest, rows: list[dict]):
    assert [one.rows for one in sampled.records] == [5, 5, 2]
    assert [row["prompt"] for row in rows] == [prompt.prompt for prompt in ASKED]
    assert [row["kind"] for row in rows] == ["single"] * 6 + ["pair"] * 6
    assert [row["seed"] for row in rows] == list(range(3, 15))


def test_a_rows_picture_is_what_the_release_draws_for_prompt_and_seed(store, released, rows):
    model = UnCLIP.load(open_release(store, released.version))
    model.tile = SPEC.tile
    row = rows[7]
    picture = model.generate([row["prompt"]], seeds=[row["seed"]])
    assert (grids.pixels(row["image"]) == picture[0].permute(1, 2, 0).numpy()).all()
    embedding = model.clip.encode_images(picture).numpy()
    assert row["embedding"] == pytest.approx(embedding[0], abs=1e-5)
    words = model.clip.encode_text([row["prompt"]]).embedding.numpy()
    assert row["clip_score"] == pytest.approx(cosine(embedding, words)[0], abs=1e-6)


def test_verdicts_are_the_judges(rows: list[dict]):
    for row, prompt in zip(rows, ASKED, strict=True):
        assert json.loads(row["verdict"]) == judge(grids.pixels(row["image"]), prompt.expected)
    # The floor judges by another prompt of the same kind: here by the next of the chunk.
    assert json.loads(rows[0]["floor_verdict"]) == judge(grids.pixels(rows[0]["image"]), ASKED[1].expected)
    assert rows[5]["floor_verdict"] is None


def test_true_pictures_are_the_ceiling(rows: list[dict]):
    truths = [json.loads(row["true_verdict"])["all"] for row in rows]
    assert sum(truths) >= 11
    assert len({tuple(row["true_embedding"]) for row in rows}) == len(rows)


def test_zero_shot_asks_for_each_attribute_of_the_prompt(rows: list[dict]):
    assert set(json.loads(rows[0]["zero_shot"])) <= {"shape", "colour", "size", "background", "all"}
    assert "background" in json.loads(rows[0]["zero_shot"])
    assert "relation" in json.loads(rows[-1]["zero_shot"])


def test_the_same_prompts_are_not_drawn_again_and_a_longer_list_draws_what_is_new(store, released, sampled):
    assert todo(store, EvaluateSample(SPEC, PoolHow(), ASKED), released) == 0
    assert todo(store, EvaluateSample(SPEC, PoolHow(), (*ASKED, *ASKED[:4])), released) == 2


def test_another_code_of_judge_or_reference_draws_anew(store, released, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own", raising=False)
    module = tmp_path / "own.py"
    module.write_text("def judge(picture, expected): return {'all': True}\ndef reference(prompts, seed, side): ...\n")

    def keys(spec: EvaluateSpec) -> list[str]:
        return [action.key for action in EvaluateSample(spec, PoolHow(), ASKED).actions(released)]

    specs = EvaluateSpec("own:judge"), EvaluateSpec(reference="own:reference"), EvaluateSpec()
    before = [keys(spec) for spec in specs]
    assert [keys(spec) for spec in specs] == before
    module.write_text(module.read_text().replace("True", "False"))
    judge, reference, neither = (keys(spec) for spec in specs)
    assert set(judge).isdisjoint(before[0])
    assert set(reference).isdisjoint(before[1])
    assert neither == before[2]


def test_how_changes_no_byte(store, released, sampled):
    stage = EvaluateSample(SPEC, PoolHow(actors=3, cpus=0.5), ASKED)
    stage = pickle.loads(pickle.dumps(stage))
    stage.setup()
    action = next(stage.actions(released))
    with store.scratch() as out:
        again = stage.run(action, store, out)
    assert again.files == sampled.records[0].files


@pytest.fixture(scope="module")
def evaluated(store: Store, released: Manifest, sampled: Manifest) -> Manifest:
    return make(store, Evaluate(), sampled, released)


def test_scores_are_those_of_the_rows(store, released, rows, evaluated):
    document = scores.read(store.get(object_name(evaluated.only.sha("scores.json"))))
    assert document == json.loads(json.dumps(scores.score(rows, released.version)))
    assert document["release"] == released.version
    assert set(document["kinds"]) == {"single", "pair"}
    assert document["cmmd"] > 0
    assert evaluated.only.facts["scores"] == scores.flat(document)


def test_grids_show_the_kept_pictures(store, rows, evaluated):
    failed = [row for row in rows if not json.loads(row["verdict"])["all"]]
    assert failed
    assert evaluated.only.facts["failed"] == len(failed)
    assert {"grid-single.png", "grid-pair.png", "grid-failures.png"} < set(evaluated.only.files)
    image = np.asarray(Image.open(store.local(object_name(evaluated.only.sha("grid-pair.png")))))
    picture = grids.pixels(rows[6]["image"]).repeat(2, 0).repeat(2, 1)
    top = grids.MARGIN
    assert (image[top : top + 128, top : top + 128] == picture).all()


def test_without_judge_and_reference_clip_alone_measures(store: Store, released: Manifest):
    spec = EvaluateSpec(chunk=2, tile=2)
    samples = make(store, EvaluateSample(spec, PoolHow(), (Prompt("a cat"), Prompt("a dog"))), released)
    made = make(store, Evaluate(), samples, released)
    assert set(made.only.files) == {"scores.json", "grid-all.png"}
    assert set(made.only.facts["scores"]) == {"clip_score", "all.clip_score"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"judge": "nowhere.at.all:judge"}, r"evaluate\.judge .* cannot be imported"),
        ({"judge": "pipelines.shapes.oracle:nothing"}, "cannot be imported"),
        ({"judge": "pipelines.shapes.oracle"}, "module:function"),
        ({"reference": "pipelines.shapes.world:COLOURS"}, "no function"),
        ({"judge": "builtins:print"}, "lies in no file"),
        ({"chunk": 0}, "chunk"),
        ({"guidance": float("nan")}, "finite"),
    ],
)
def test_impossible_evaluations_are_refused_before_anything_is_drawn(changes, reason):
    with pytest.raises(Refused, match=reason):
        EvaluateSample(EvaluateSpec(**changes), PoolHow(), ASKED)


def test_a_stage_that_travels_is_small():
    assert len(pickle.dumps(EvaluateSample(SPEC, PoolHow(), ASKED * 100))) < 300_000
    assert len(repr(EvaluateSample(SPEC, PoolHow(), ASKED * 100))) < 1000


def test_evaluation_code_lies_below_no_world():
    """The pipeline knows the demo's world by the recipe's names alone."""
    files = list(Path(pipelines.evaluate.__file__).parent.glob("*.py"))
    assert len(files) > 3
    assert [path.name for path in files if "shapes" in path.read_text()] == []
