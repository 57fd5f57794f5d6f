"""A prior's γ from rows of the data to a release that Analytic-DPM samples."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from infra.errors import Refused as ImpossibleHere
from infra.records.commits import commit
from infra.records.folders import materialise
from infra.records.manifest import Action, Block, Manifest, Record
from infra.records.objects import object_name
from infra.records.schemas import embedded_schema
from infra.store.base import Store
from infra.store.opening import open_store
from pipelines.embed.stage import load_clip
from pipelines.fit.gamma import Gamma, GammaSpec
from pipelines.recipe import schema as recipe
from pipelines.recipe import stages as workflow
from pipelines.release.bundle import Bundle, BundleSpec
from pipelines.release.open import open_release
from pipelines.select.rules import ClipScore
from pipelines.select.stage import FeatureStage, Select
from pipelines.stage import PoolHow, plain
from tests.fixtures.line import MODELS, SAMPLING_SECTION, Line, put
from tests.fixtures.release import MODEL, shaken
from tests.fixtures.stages import make
from unclip import UnCLIP
from unclip.diffusion.analytic import estimate_gamma
from unclip.diffusion.guidance import conditional
from unclip.diffusion.settings import Sampling
from unclip.files import read_tensors
from unclip.models.prior import DiffusionPrior
from unclip.presets import TINY
from unclip.release.model import GAMMA, load_model, save_model

WIDTH, STEPS, SPEC = MODEL["embed_dim"], 20, GammaSpec(samples=128, batch=64)
ANALYTIC = dataclasses.asdict(Sampling("analytic_dpm", 4, candidates=2))
CAPTIONS = ("a red circle", "a small blue square", "two green crosses", "")


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """Models of random weights, and rows of Gaussian embeddings beside them of which curate keeps two thirds."""
    folder = tmp_path_factory.mktemp("gamma")
    line = Line(open_store(str(folder / "store")), folder)
    line.made["embed"] = rows(line.store, 400, 200)
    rules = (ClipScore(min_score=0.3),)
    looked = make(line.store, FeatureStage("curate", rules), line.made["embed"])
    line.made["curate"] = make(line.store, Select("curate", rules), looked, line.made["embed"])
    return line


def rows(store: Store, *sizes: int) -> Manifest:
    """Shards of embed: normal embeddings about 3 with deviation 2; every third row is far off and has a low score."""
    draw, number, records = np.random.default_rng(0), itertools.count(), []
    for size in sizes:
        places = [next(number) for _ in range(size)]
        image = (3 + 2 * draw.normal(size=(size, WIDTH))).astype(np.float32)
        image[[place % 3 == 0 for place in places]] = 1e4
        vectors = partial(pa.FixedSizeListArray.from_arrays, type=embedded_schema(WIDTH).field("image_embedding").type)
        columns = {
            "uid": [hashlib.sha256(str(place).encode()).digest()[:16] for place in places],
            "caption": [CAPTIONS[place % 4] for place in places],
            "image_embedding": vectors(pa.array(image.reshape(-1))),
            "text_embedding": vectors(pa.array(image.reshape(-1))),
            "score": pa.array([0.1 if place % 3 == 0 else 0.4 for place in places], pa.float32()),
            "image": [b""] * size,
            "url": [""] * size,
        }
        action = Action("embed/1", {}, (str(size),))
        with store.scratch() as out:
            pq.write_table(pa.table(columns, schema=embedded_schema(WIDTH)), out / "rows.parquet", row_group_size=100)
            blocks = [Block("rows.parquet", first, min(100, size - first)) for first in range(0, size, 100)]
            records.append(commit(store, action, Record.of(action, out, blocks=blocks), out))
    manifest = Manifest(Action("embed/1", {}, ()), tuple(records))
    manifest.save(store)
    return manifest


def prior_of(line: Line, prior: DiffusionPrior) -> Manifest:
    """That model as its fit leaves it, under a key of its own."""
    fingerprint = load_clip(line.store, line.made["clip"].version, "cpu").fingerprint
    write = partial(save_model, kind="prior", config=prior.config, state=prior.state_dict(), clip=fingerprint)
    return put(line.store, "prior", write, repr(prior.config), facts={"steps": 1})


def gamma_of(line: Line, prior: Manifest, how: PoolHow | None = None) -> Manifest:
    stage = Gamma(SPEC, how or PoolHow())
    return make(line.store, stage, *({**line.made, "prior": prior}[need] for need in stage.needs))


def table(line: Line, made: Manifest) -> torch.Tensor:
    return read_tensors(line.store.local(object_name(made.only.sha(GAMMA))))["gamma"]


def test_the_optimal_prior_of_gaussian_data_has_the_gamma_of_the_closed_form(line: Line):
    """Of standard normal data E[v | x_t] = 0, so a prior of v whose last layer is 0 is optimal, and ε̂ = σ_t·x_t.

    Then γ_t = σ_t², and a mean of 128 · 32 squares of normal numbers deviates by √(2 / 4096) = 2.2 % of it. Each
    timestep within 4.5 of that. Rejected rows would make it thousands of times larger, unstandardised ones four.
    """
    prior = DiffusionPrior(dataclasses.replace(TINY.prior, prediction="v", timesteps=STEPS))
    torch.nn.init.zeros_(prior.out.weight)
    torch.nn.init.zeros_(prior.out.bias)
    prior.mean.fill_(3)
    prior.std.fill_(2)
    found = table(line, gamma_of(line, prior_of(line, prior)))
    expected = 1 - prior.schedule.alphas_cumprod
    error = (2 / (SPEC.samples * WIDTH)) ** 0.5 * expected
    assert found.dtype == torch.float64
    assert ((found - expected) / error).abs().max() < 4.5


@pytest.fixture(scope="module")
def measured(line: Line) -> dict[str, Manifest]:
    """A prior of random weights whose samples are clamped, and its γ."""
    config = dataclasses.replace(TINY.prior, timesteps=STEPS, clip_range=1.0)
    model = shaken(DiffusionPrior(config), 5)
    model.out.weight.data *= 10  # so that the clamp has something to do
    model.mean.fill_(3)
    model.std.fill_(2)
    prior = prior_of(line, model)
    return {**line.made, "prior": prior, "gamma": gamma_of(line, prior)}


def test_the_prior_is_measured_as_it_is_sampled(line: Line, measured, tmp_path: Path):
    """Clamped: against the same mean by hand over rows of the same distribution, and captions of the same four."""
    found = table(line, measured["gamma"])
    prior = load_model(materialise(line.store, measured["prior"].only, tmp_path / "prior"), "prior")
    clip = load_clip(line.store, line.made["clip"].version, "cpu")
    x0 = torch.from_numpy(np.random.default_rng(1).normal(size=(128, WIDTH)).astype(np.float32))
    free = conditional(prior.denoise, prior.context(*clip.encode_text([CAPTIONS[row % 4] for row in range(128)])))
    expected, unclamped = (
        estimate_gamma([(denoise, x0)], prior.schedule, seed=9) for denoise in (prior.in_range(free), free)
    )
    # Each deviates by 2 or 3 %; without the clamp the smallest noise levels would be at twice as much.
    assert torch.allclose(found, expected, rtol=0.15)
    assert not torch.allclose(found, unclamped, rtol=0.5)


def test_how_it_is_measured_changes_no_byte(line: Line, measured):
    stage = Gamma(SPEC, PoolHow(actors=2, cpus=0.5))
    action = next(stage.actions(*(measured[need] for need in stage.needs)))
    with line.store.scratch() as out:
        assert stage.run(action, line.store, out).files == measured["gamma"].only.files


def bundle(line: Line, made: dict[str, Manifest], prior: dict, with_gamma: bool) -> Manifest:
    section = {**SAMPLING_SECTION, "prior": prior}
    stage = Bundle(BundleSpec("unclip", section), MODELS, with_gamma)
    return make(line.store, stage, *(made[need] for need in stage.needs))


def test_its_release_is_sampled_with_it(line: Line, measured, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = bundle(line, measured, ANALYTIC, True)
    model = UnCLIP.load(open_release(line.store, made.version))
    assert torch.equal(model.gamma["prior"], table(line, measured["gamma"]))
    text = model.clip.encode_text(["a red circle"])
    own = dataclasses.replace(model.sampling["prior"], gamma=tuple(model.gamma["prior"].tolist()))
    other = dataclasses.replace(own, gamma=(0.0,) * STEPS)
    drawn, same, unlike = (
        model.sample_prior(text, [0], settings) for settings in (model.sampling["prior"], own, other)
    )
    assert torch.equal(drawn, same)
    assert not torch.equal(drawn, unlike)
    assert model.generate(["a red circle"]).shape == (1, 3, 64, 64)


def test_without_it_analytic_dpm_is_refused_with_the_reason(line: Line, measured, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="prior: analytic_dpm takes its variances from a table of γ"):
        bundle(line, measured, ANALYTIC, False)
    plain_one = bundle(line, measured, SAMPLING_SECTION["prior"], False)
    model = UnCLIP.load(open_release(line.store, plain_one.version))
    with pytest.raises(ValueError, match="prior: analytic_dpm"):
        model.generate(["a red circle"], sampling={"prior": Sampling("analytic_dpm", 4)})
    with pytest.raises(ValueError, match="decoder: analytic_dpm"):
        model.generate(["a red circle"], sampling={"decoder": Sampling("analytic_dpm", 4)})


def test_a_table_of_another_process_is_refused(line: Line, measured, tmp_path: Path):
    longer = DiffusionPrior(dataclasses.replace(TINY.prior, timesteps=STEPS + 1))
    with pytest.raises(ValueError, match=r"has 21 timesteps: gamma \[21\]"):
        bundle(line, {**measured, "prior": prior_of(line, longer)}, ANALYTIC, True)


def stages(name: str, *changes: str) -> dict[str, object]:
    inputs = workflow.Inputs("list.parquet", ("0" * 64,), str(recipe.FOLDER / "prompts.jsonl"), None)
    return {stage.name: stage for stage in workflow.stages(recipe.load(name, changes), inputs)}


def test_only_a_recipe_that_asks_for_it_measures_it():
    asked = stages("demo", "sampling.prior={sampler: analytic_dpm, steps: 8}", "prior.gpus=1")
    assert asked["bundle"].needs == (*stages("demo")["bundle"].needs, "gamma")
    assert asked["gamma"].how == PoolHow(actors=1, threads=1, cpus=0.5, gpus=1)
    assert plain(asked["prior"].spec) == plain(stages("demo")["prior"].spec)
    brought = f"sampling.prior={{sampler: analytic_dpm, steps: 8, gamma: {[0.5] * 1000}}}"
    for made in (stages("demo"), stages("demo", brought), stages("demo", "prior=null", "ar_prior.train.steps=7")):
        assert "gamma" not in made
    assert "gamma" in stages("paper")
    with pytest.raises(ImpossibleHere, match=r"sampling\.upsamplers\.64: .*a table of γ"):
        stages("demo", "sampling.upsamplers.64={sampler: analytic_dpm, steps: 8}")
    with pytest.raises(ImpossibleHere, match="no whole number of batches"):
        GammaSpec(samples=100, batch=64)
