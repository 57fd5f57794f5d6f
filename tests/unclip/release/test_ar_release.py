"""The autoregressive prior in a release, what is refused, and how large the paper's is."""

from __future__ import annotations

import itertools
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.fixtures.release import SAMPLING, shaken, write_parts
from unclip import UnCLIP
from unclip.diffusion.settings import Sampling
from unclip.errors import Refused
from unclip.files import read_tensors
from unclip.models.ar_prior import AutoregressivePrior
from unclip.presets import PAPER, TINY
from unclip.progress import Progress
from unclip.release.folder import read_release, save_release
from unclip.release.model import load_model, read_model_config, save_gamma, save_model

assert TINY.ar_prior is not None
CONFIG = TINY.ar_prior


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny release whose prior is autoregressive."""
    root = tmp_path_factory.mktemp("autoregressive")
    parts = write_parts(root / "parts")
    clip = read_model_config(parts["prior"], "prior")[1]
    prior = shaken(AutoregressivePrior(CONFIG), 7)
    save_model(root / "prior", "ar_prior", CONFIG, prior.state_dict(), clip=clip)
    settings = {"prior": Sampling(guidance=2.0, candidates=2, temperature=0.8)}
    save_release(root / "release", "tiny", parts | {"prior": root / "prior"}, SAMPLING | settings)
    return root / "release"


def test_a_release_holds_it_in_the_diffusion_priors_place(folder):
    model = UnCLIP.load(folder)
    assert isinstance(model.prior, AutoregressivePrior)
    assert model.prior.config == CONFIG
    saved = read_tensors(folder / "prior" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.prior.state_dict().items())
    assert model.sampling["prior"] == Sampling(guidance=2.0, candidates=2, temperature=0.8)
    with pytest.raises(Refused, match="holds a 'ar_prior', and a 'prior' was asked for"):
        load_model(folder / "prior", "prior")


def test_its_pictures_depend_on_prompt_and_seed_alone(folder):
    model = UnCLIP.load(folder)
    prompts, seeds = ["a red circle", "a small blue square", "two green stars"], [4, 5, 4]
    model.tile = 2
    together = model.generate(prompts, seeds=seeds)
    assert together.shape == (3, 3, 64, 64)
    alone = torch.cat([model.generate([p], seeds=[s]) for p, s in zip(prompts, seeds, strict=True)])
    assert torch.equal(together, alone)
    assert len({picture.numpy().tobytes() for picture in together}) == 3


def test_the_candidate_with_the_largest_dot_product_is_kept(folder):
    model = UnCLIP.load(folder)
    text = model.clip.encode_text(["a red circle", "a blue square"])
    likes = [
        (model.sample_prior(text, [0, 1], Sampling(candidates=count)) * text.embedding).sum(1) for count in (1, 2, 4, 8)
    ]
    assert all((more >= fewer).all() for fewer, more in itertools.pairwise(likes))
    assert (likes[-1] > likes[0]).any()


def test_a_callback_sees_every_token(folder):
    model = UnCLIP.load(folder)
    seen: list[Progress] = []
    model.generate(["a red circle"], callback=seen.append)
    told = [(p.step, p.steps) for p in seen if p.component == "prior"]
    assert told == [(step, CONFIG.tokens) for step in range(1, CONFIG.tokens + 1)] * 2
    first = next(p for p in seen if p.component == "prior")
    assert torch.allclose(first.x0, model.prior.pca.mean.expand_as(first.x0))


def test_temperature_is_an_autoregressive_priors_alone_and_leaves_other_documents_as_they_were(folder):
    model = UnCLIP.load(folder)
    with pytest.raises(Refused, match="decoder denoises"):
        model.generate(["a"], sampling={"decoder": Sampling(temperature=0.5)})
    with pytest.raises(Refused, match="this prior is autoregressive"):
        model.generate(["a"], sampling={"prior": Sampling(guidance=2.0, rescale=0.5)})
    with pytest.raises(Refused, match="temperature"):
        Sampling(temperature=-0.1)
    assert set(Sampling().document()) == {"sampler", "steps", "guidance", "eta", "candidates"}
    assert Sampling(**Sampling(temperature=0.5).document()) == Sampling(temperature=0.5)


# What is refused, and how large the paper's is


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"components": 33}, "between 1 and the embedding's width, 32"),
        ({"components": 0}, "components is 0"),
        ({"buckets": 1}, "at least 2"),
        ({"heads": 3}, "does not divide into 3 heads"),
        ({"heads": 0}, "heads is 0"),
        ({"depth": 0}, "depth is 0"),
        ({"explained": 0.0}, "explained"),
        ({"explained": 1.1}, "explained"),
        ({"reach": 0.0}, "reach"),
        ({"reach": math.nan}, "reach"),
        ({"text_depth": 1, "context_width": 30, "text_heads": 4}, "text encoder of 30"),
    ],
)
def test_impossible_shapes_are_refused(change, reason):
    with pytest.raises(Refused, match=reason):
        replace(CONFIG, **change)


def test_bounds_of_no_rows_are_refused():
    with pytest.raises(Refused, match="no row"):
        AutoregressivePrior(CONFIG).set_dots(torch.zeros(0))


def test_a_prior_of_other_widths_is_refused_in_a_cascade(folder):
    model = UnCLIP.load(folder)
    other = AutoregressivePrior(replace(CONFIG, text_width=48))
    with pytest.raises(Refused, match="made for text_width 48, and CLIP's is 32"):
        UnCLIP(model.clip, other, model.decoder, model.upsamplers)


def test_a_table_of_variances_beside_it_is_refused(folder, tmp_path):
    """It does not denoise: neither γ nor Analytic-DPM has a meaning for it, and the sampler's name none either."""
    whole = read_release(folder)
    parts = {name: tmp_path / "parts" / name for name in whole.components}
    for name, part in parts.items():
        shutil.copytree(folder / name, part)
    settings = whole.sampling | {"prior": Sampling("analytic_dpm", 4)}
    save_release(tmp_path / "fine", "tiny", parts, settings)
    save_gamma(parts["prior"], torch.ones(1000))
    with pytest.raises(Refused, match="beside an autoregressive prior"):
        save_release(tmp_path / "release", "tiny", parts, settings)


def test_the_papers_widths_and_depths_give_two_billion():
    """The table says 1 B and gives two transformers: 24 layers of 2048 over the text (1.21 B), and 24 of 1664 over the
    latents (0.80 B). Ours has both; without the text encoder, on CLIP's own token states, it is near the 1 B."""
    assert PAPER.ar_prior is not None
    with torch.device("meta"):
        whole = AutoregressivePrior(PAPER.ar_prior)
        latent = AutoregressivePrior(replace(PAPER.ar_prior, context_width=None, text_depth=0))
    count = {name: sum(p.numel() for p in model.parameters()) for name, model in (("whole", whole), ("latent", latent))}
    assert count["whole"] == pytest.approx(2.02e9, rel=0.01)
    assert count["latent"] == pytest.approx(0.80e9, rel=0.02)
    assert sum(p.numel() for p in whole.text.blocks.parameters()) == 24 * (12 * 2048**2 + 13 * 2048)
    assert PAPER.ar_prior.tokens == 320
