"""Recipes that come with unclip are valid, plan, and say each number once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra.errors import Refused
from infra.records.manifest import Action, Manifest
from pipelines.recipe import schema as recipe
from pipelines.recipe import stages as workflow
from pipelines.recipe.models import clip_widths
from pipelines.run import recipe_text
from pipelines.stage import plain

NAMES = ("demo", "tiny", "laion-art", "paper")


def stages(name: str, *changes: str) -> dict[str, object]:
    inputs = workflow.Inputs("list.parquet", ("0" * 64,), str(recipe.FOLDER / "prompts.jsonl"), None)
    return {stage.name: stage for stage in workflow.stages(recipe.load(name, changes), inputs)}


def test_the_recipes_are_there() -> None:
    assert set(NAMES) <= set(recipe.names())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_gives_a_whole_workflow(name: str) -> None:
    made = stages(name)
    for stage in ("source", "download", "filter", "clip", "embed", "curate", "statistics", "prior", "decoder",
                  "bundle", "evaluate", "gate", "promote", "report"):  # fmt: skip
        assert stage in made, f"{name} lacks {stage}"


def test_sides_follow_from_each_other() -> None:
    models = workflow.models(recipe.load("demo", ["embed.base=16"]))
    assert models["decoder"].size == 16
    assert models["upsampler-64"].low == 16
    assert models["upsampler-128"].low == 64


def test_widths_follow_from_clip() -> None:
    config = recipe.load("laion-art")
    models = workflow.models(config)
    assert models["prior"].embedding == models["decoder"].embedding == clip_widths(config)["embedding"]


def test_a_side_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(Refused, match="multiple"):
        workflow.models(recipe.load("demo", ["embed.base=48"]))


def test_how_is_in_no_key() -> None:
    one, other = stages("demo", "download.threads=1"), stages("demo", "download.threads=7")
    assert plain(one["download"].spec) == plain(other["download"].spec)  # type: ignore[attr-defined]
    assert one["download"].how != other["download"].how  # type: ignore[attr-defined]


def test_an_unknown_rule_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="clip_score"):
        recipe.load("demo", ["curate.rules=[{rule: clip_skore, min: 0.1}]"])


def test_a_key_derived_from_another_is_no_key() -> None:
    with pytest.raises(Refused, match=r"decoder\.model\.size is no known key"):
        recipe.load("demo", ["decoder.model.size=64"])


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("models: [demo")
    with pytest.raises(Refused, match=r"bad\.yaml is not valid YAML"):
        recipe.load(str(path))


def test_a_number_may_be_written_as_people_write_it() -> None:
    assert recipe.load("demo", ["decoder.train.lr=2e-4"]).decoder.train.lr == 2e-4  # type: ignore[attr-defined]


def test_the_prior_may_be_autoregressive() -> None:
    diffusion, other = (
        stages("demo"),
        stages("demo", "prior=null", "ar_prior.train.steps=7", "ar_prior.model.buckets=64"),
    )
    fit = other["prior"]
    assert (diffusion["prior"].model, fit.model) == ("prior", "ar_prior")  # type: ignore[attr-defined]
    assert fit.spec.model["buckets"] == 64  # type: ignore[attr-defined]
    assert fit.spec.model["embedding"] == 128  # type: ignore[attr-defined]
    assert fit.spec.train["steps"] == 7  # type: ignore[attr-defined]
    unchanged = set(diffusion) - {"prior"}
    assert all(plain(other[name].spec) == plain(diffusion[name].spec) for name in unchanged)  # type: ignore[attr-defined]


def test_a_recipe_has_one_prior() -> None:
    with pytest.raises(Refused, match="either `prior`"):
        recipe.load("demo", ["ar_prior.train.steps=7"])
    with pytest.raises(Refused, match="either `prior`"):
        recipe.load("demo", ["prior=null"])
    with pytest.raises(Refused, match=r"ar_prior\.train\.t_std is no known key"):
        recipe.load("demo", ["prior=null", "ar_prior.train={steps: 7, t_std: 1}"])


def test_a_resnets_clip_trains_on_one_worker() -> None:
    with pytest.raises(Refused, match=r"clip\.workers is 2, and a ResNet's batch norms"):
        recipe.load("demo", ["clip.workers=2"])
    assert recipe.load("tiny", ["clip.workers=2"]).clip.workers == 2  # type: ignore[attr-defined]


PROMPTS_ONLY = ("prior=null", "sampling.prior=null", "decoder.model={text: own, image: false}")


def test_a_decoder_may_draw_from_prompts_alone_and_needs_no_prior() -> None:
    usual, made = stages("demo"), stages("demo", *PROMPTS_ONLY)
    assert set(usual) - set(made) == {"prior"}
    model = made["decoder"].spec.model  # type: ignore[attr-defined]
    assert (model["text"], model["image"], model["vocabulary"]) == ("own", False, 5514)
    assert "prior" not in made["bundle"].needs  # type: ignore[attr-defined]
    assert "prior" not in made["bundle"].spec.sampling  # type: ignore[attr-defined]
    rows = ("upsampler-64", "upsampler-128", "clip")
    assert all(plain(made[name].spec) == plain(usual[name].spec) for name in rows)  # type: ignore[attr-defined]
    glide = recipe.load("paper", ["models=glide", "prior=null", "sampling.prior=null"])
    assert glide.prompts_only
    assert workflow.models(glide)["decoder"].text == "own"


def test_a_prior_where_nothing_would_use_it_is_refused() -> None:
    for change in ("prior=null", "sampling.prior=null"):
        with pytest.raises(Refused, match="draws from prompts alone"):
            recipe.load("demo", [change, "decoder.model.image=false"])
    with pytest.raises(Refused, match=r"sampling\.prior is missing"):
        recipe.load("demo", ["sampling.prior=null"])
    with pytest.raises(Refused, match="no diffusion prior; choose another preset"):
        workflow.models(recipe.load("demo", ["models=glide", "decoder.model={image: true}"]))


def test_an_inpainter_goes_on_from_the_decoder_of_its_run() -> None:
    usual, made = stages("demo"), stages("demo", "inpainter.train={steps: 7, drop_known: 0.2}")
    assert set(made) - set(usual) == {"inpainter"}
    fit = made["inpainter"]
    assert (fit.model, fit.needs[-1]) == ("inpainter", "decoder")  # type: ignore[attr-defined]
    assert fit.spec.model == plain(usual["decoder"].spec)["model"] | {"inpaint": True}  # type: ignore[attr-defined]
    assert fit.spec.train["drop_known"] == 0.2  # type: ignore[attr-defined]
    assert "inpainter" in made["bundle"].needs  # type: ignore[attr-defined]
    same = set(usual) - {"gate", "promote"}
    assert all(plain(made[name].spec) == plain(usual[name].spec) for name in same)  # type: ignore[attr-defined]
    (action,) = fit.actions(*(Manifest(Action(f"{need}/1", {}, ()), ()) for need in fit.needs))  # type: ignore[attr-defined]
    assert len(action.inputs) == len(fit.needs)  # type: ignore[attr-defined]


def test_what_decoders_were_before_they_could_do_more_is_in_their_keys_alone() -> None:
    new = {"text", "vocabulary", "image", "inpaint"}
    for name in NAMES:
        assert not new & set(stages(name)["decoder"].spec.model)  # type: ignore[attr-defined]
    with pytest.raises(Refused, match=r"decoder\.model\.inpaint is no known key"):
        recipe.load("demo", ["decoder.model.inpaint=true"])


def test_a_temperature_of_one_is_in_no_key() -> None:
    spec = plain(stages("demo")["bundle"].spec)  # type: ignore[attr-defined]
    assert "temperature" not in spec["sampling"]["prior"]
    warm = plain(
        stages("demo", "prior=null", "ar_prior.train.steps=7", "sampling.prior.temperature=0.9")["bundle"].spec
    )  # type: ignore[attr-defined]
    assert warm["sampling"]["prior"]["temperature"] == 0.9


def test_an_accelerator_is_a_kind_of_the_table_and_its_peak_is_the_fits() -> None:
    table = "hardware={H100: {tflops: 989, memory_gib: 80}}"
    made: dict[str, Any] = stages("tiny", table, "prior.accelerator=H100")
    assert (made["prior"].how.peak_tflops, made["decoder"].how.peak_tflops) == (989, 0)
    with pytest.raises(Refused, match=r"prior\.accelerator is 'H200', and hardware names H100"):
        recipe.load("tiny", [table, "prior.accelerator=H200"])
    with pytest.raises(Refused, match=r"hardware names no kind"):
        recipe.load("tiny", ["upsamplers.32.accelerator=H100"])


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_that_mlflow_gets_is_the_recipe(name: str, tmp_path: Path) -> None:
    changes = ["decoder.train.steps=7", "decoder.preview_share=0"]
    asked = recipe.load(name, changes)
    (tmp_path / "told.yaml").write_text(recipe_text(asked))
    assert recipe.load(str(tmp_path / "told.yaml")) == asked
    secret = recipe.load(name, ["tracking.uri=http://me:secret@host:5000"])
    assert "secret" not in recipe_text(secret)
