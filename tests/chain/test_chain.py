"""The whole chain on the tiny recipe: from a web server to a promoted release, and what a second run costs."""

from __future__ import annotations

import json
import sqlite3
from importlib.metadata import version
from pathlib import Path

import pytest

from infra.documents import digest_file
from infra.ledger import Ledger
from infra.store.opening import open_store
from infra.tracking.mlflow import open_client
from infra.tracking.uri import default_uri
from pipelines.recipe import schema as recipe
from pipelines.release.open import open_release
from tests.fixtures import beside_diffusers
from tests.fixtures.tiny_run import here, newest, objects, todo, unclip
from tests.proofs import parallel
from unclip import UnCLIP

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_run_ends_with_a_champion_and_says_how_to_use_it(finished: tuple[Path, str]) -> None:
    store, said = finished
    head = Ledger(open_store(str(store)), "tiny").head()
    assert head is not None
    for word in ("champion", "grid", "report", "unclip ui", "unclip generate"):
        assert word in said
    assert "(raylet)" not in said
    assert "WARNING" not in said


def test_a_second_run_starts_no_ray_and_changes_nothing(copy: Path) -> None:
    before = objects(copy)
    said = here("run", "tiny", "--store", copy)
    assert "starting Ray" not in said
    assert objects(copy) == before
    assert todo(copy) == {}


def test_diffusers_draws_from_the_export_what_the_champion_draws(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here("releases", "export", "champion", tmp_path / "diffusers", "--store", finished[0])
    model = UnCLIP.load(open_release(open_store(str(finished[0])), "champion"))
    pipe = beside_diffusers.pipeline(tmp_path / "diffusers")
    beside_diffusers.exact(pipe)
    unguided = {"prior": 1.0, "decoder": 1.0}
    pictures = beside_diffusers.drawn(model, unguided)
    assert beside_diffusers.far(beside_diffusers.theirs(pipe, monkeypatch, unguided), pictures) < 1e-4
    # The first step divides rounding by an α of 5e-5, guidance multiplies it, and clipping to ±1 hides it but in the
    # odd pixel that lies between: one of 6,144 was off by 2.5e-4, the mean by 8e-8.
    pictures = beside_diffusers.drawn(model, beside_diffusers.SCALES)
    apart = (beside_diffusers.theirs(pipe, monkeypatch, beside_diffusers.SCALES) - pictures).abs()
    assert float(apart.mean()) < 1e-6
    assert float((apart > 1e-4).float().mean()) < 2e-3


def test_gc_leaves_all_that_a_run_and_a_release_need(copy: Path) -> None:
    for keep in ("all", "newest"):
        here("data", "gc", "--keep", keep, "--older-than", 0, "--delete", "--store", copy)
        assert todo(copy) == {}
        assert "are whole" in here("releases", "verify", "--name", "tiny", "--store", copy)
        assert "all is whole" in here("data", "verify", "--store", copy)


def test_every_row_of_the_list_is_in_exactly_one_final_state(finished: tuple[Path, str]) -> None:
    from pipelines.engine.versions import reconcile

    store, _ = finished
    stages = ("source", "download", "filter", "embed", "curate")
    states = reconcile(*(newest(store, stage) for stage in stages))
    assert recipe.load("tiny").world is not None
    assert sum(states.values()) == recipe.load("tiny").world.pictures  # type: ignore[union-attr]
    assert states["kept"] > 0.5 * sum(states.values())
    assert {"filter.exact_duplicates", "filter.near_duplicates", "curate.clip_score"} <= set(states)


def test_mlflow_knows_what_became_of_the_rows_of_every_data_stage(finished: tuple[Path, str]) -> None:
    query = "select m.key, m.value from latest_metrics m join runs r using (run_uuid) where r.name = ? and r.status = ?"
    for stage in ("download", "filter", "embed", "curate"):
        with sqlite3.connect(finished[0] / "mlflow" / "mlflow.db") as database:
            told = dict(database.execute(query, (stage, "FINISHED")).fetchall())
        made = newest(finished[0], stage)
        assert {name.removeprefix("rows."): count for name, count in told.items() if "." in name} == made.states
        assert (told["rows"], told["shards"]) == (made.rows, len(made.records))
        assert told["success_rate"] == pytest.approx(made.states["kept"] / made.rows)


def test_mlflow_knows_recipe_code_and_data_of_a_run_and_finds_the_data_itself(finished: tuple[Path, str]) -> None:
    store = finished[0]
    client = open_client(default_uri(str(store)))
    import mlflow.data

    runs = client.search_runs([client.get_experiment_by_name("unclip").experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.data.tags["mlflow.source.name"] == "unclip run tiny"
    assert parent.data.tags["unclip.torch"] == version("torch")
    kept = Path(parent.info.artifact_uri.removeprefix("file://"))
    assert recipe.load(str(kept / "recipe.yaml")) == recipe.load("tiny")
    assert f"ray=={version('ray')}" in (kept / "packages.txt").read_text().splitlines()
    (decoder,) = [run for run in runs if run.info.run_name == "decoder"]
    assert decoder.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert decoder.data.tags.get("mlflow.source.git.commit") == parent.data.tags.get("mlflow.source.git.commit")
    made = newest(store, "decoder").only
    assert decoder.data.tags["unclip.made.model.safetensors"] == made.sha("model.safetensors")
    assert int(decoder.data.tags["unclip.checkpoint.samples"]) == made.facts["samples"]
    read = {data.dataset.name: data for data in decoder.inputs.dataset_inputs}
    assert set(read) == {"embed", "curate", "statistics", "clip"}
    for stage, data in read.items():
        manifest = newest(store, stage)
        assert data.dataset.digest == manifest.version[:36]
        assert digest_file(Path(mlflow.data.get_source(data).load())) == manifest.version
        assert json.loads(data.dataset.profile)["states"] == manifest.states


def test_a_run_leaves_a_page_about_its_data(finished: tuple[Path, str], tmp_path: Path) -> None:
    store, said = finished
    (line,) = [line for line in said.splitlines() if line.startswith("data  ")]
    page = Path(line.split()[1])
    assert page == store / "view" / newest(store, "curate").version[:12] / "data.html"
    here("data", "report", "--store", store, "--out", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_the_trainers_overlap_in_time(finished: tuple[Path, str]) -> None:
    spans = parallel.spans(finished[0])
    assert len(spans) == 4
    assert max(start for start, _ in spans.values()) < min(end for _, end in spans.values())


def test_another_number_of_prior_steps_redoes_the_prior_and_what_is_behind_it(copy: Path) -> None:
    change = ("--set", "prior.train.steps=9")
    expected = {"prior", "bundle", "evaluate-sample", "evaluate", "gate", "promote", "report"}
    assert set(todo(copy, *change)) == expected
    before = objects(copy)
    unclip("run", "tiny", "--store", copy, *change)
    new = {name.split("/")[1].rsplit("-", 1)[0] for name in objects(copy) - before if name.startswith("records/")}
    assert new == expected


def test_a_tenth_more_rows_download_and_embed_only_the_new_shards(copy: Path) -> None:
    world = recipe.load("tiny").world
    assert world is not None
    change = ("--set", f"world.pictures={world.pictures * 11 // 10}")
    shards = len(newest(copy, "download").records)
    download = todo(copy, *change)["download"]
    assert 1 <= download <= max(2, shards // 5 + 1)
    before = objects(copy)
    unclip("run", "tiny", "--store", copy, "--until", "embed", *change)
    grown = [name for name in objects(copy) - before if name.startswith("records/")]
    assert sum(name.startswith("records/download-") for name in grown) == download


def test_generate_draws_with_the_champion(finished: tuple[Path, str], tmp_path: Path) -> None:
    from PIL import Image

    out = tmp_path / "grid.png"
    here("generate", "a large red circle on a white background", "-n", 2, "--release", "tiny@champion",
           "--out", out, "--store", finished[0])  # fmt: skip
    assert Image.open(out).width >= 2 * 64


def test_the_models_and_data_can_be_looked_at(finished: tuple[Path, str]) -> None:
    store, _ = finished
    assert "embed" in here("data", "ls", "--store", store)
    assert "promote" in here("releases", "list", "--name", "tiny", "--store", store)
    assert json.loads(here("releases", "show", "tiny@champion", "--store", store))
    assert here("releases", "verify", "--name", "tiny", "--store", store)
