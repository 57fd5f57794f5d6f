"""Settings of sampling: what they change in a cascade, what JSON makes of them, what is refused."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from tests.fixtures.release import write_release
from unclip import UnCLIP
from unclip.diffusion.settings import Sampling, check_sampling
from unclip.errors import Refused

GAMMA = tuple(torch.linspace(0.05, 0.99, 1000).tolist())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> UnCLIP:
    folder: Path = write_release(tmp_path_factory.mktemp("sampling") / "release")
    model = UnCLIP.load(folder)
    model.tile = 1
    return model


@pytest.mark.parametrize(
    ("component", "plain", "changed"),
    [
        ("prior", Sampling("ddpm", 4), Sampling("ddpm", 4, variance="fixed_large")),
        ("prior", Sampling("ddpm", 4), Sampling("analytic_dpm", 4, gamma=GAMMA)),
        ("prior", Sampling(steps=4, guidance=3), Sampling(steps=4, guidance=3, interval=(0, 500))),
        ("prior", Sampling(steps=4, guidance=3), Sampling(steps=4, guidance=3, rescale=0.7)),
        ("decoder", Sampling(steps=4, guidance=9), Sampling(steps=4, guidance=9, percentile=0.8)),
        ("decoder", Sampling("ddpm", 4), Sampling("ddpm", 4, variance="fixed_small")),
        ("upsampler-32", Sampling(steps=2), Sampling(steps=2, percentile=0.8)),
    ],
    ids=lambda settings: settings if isinstance(settings, str) else "",
)
def test_a_setting_reaches_its_model(model: UnCLIP, component: str, plain: Sampling, changed: Sampling):
    text = model.clip.encode_text(["a red circle"])
    if component == "prior":
        a, b = (model.sample_prior(text, [0], settings) for settings in (plain, changed))
    elif component == "decoder":
        a, b = (model.sample_decoder(text.embedding, text, [0], settings) for settings in (plain, changed))
    else:
        low = torch.rand(1, 3, 32, 32)[..., :16, :16]
        a, b = (model.sample_upsampler(model.upsamplers[0], low, [0], settings) for settings in (plain, changed))
    assert a.isfinite().all()
    assert b.isfinite().all()
    assert not torch.equal(a, b)


def test_settings_survive_json():
    settings = Sampling("analytic_dpm", 8, guidance=2.0, interval=(10, 900), rescale=0.5, gamma=GAMMA)
    assert Sampling(**json.loads(json.dumps(dataclasses.asdict(settings)))) == settings


def test_settings_of_before_mean_what_they_meant():
    old = {"sampler": "ddim", "steps": 50, "guidance": 1.0, "eta": 0.0, "candidates": 1}
    assert Sampling(**old) == Sampling()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"steps": 2.5}, "steps is 2.5; it must be a whole number"),
        ({"steps": math.nan}, "steps is nan; it must be a whole number"),
        ({"guidance": math.nan}, "not nan"),
        ({"guidance": -1.0}, "at least 0 .*not -1"),
        ({"eta": 1.5}, "between 0 and 1, not 1.5"),
        ({"eta": 0.5, "sampler": "ddpm"}, "ddpm has none"),
        ({"interval": (9, 3)}, r"not \(9, 3\)"),
        ({"rescale": -0.1}, "between 0 and 1, not -0.1"),
        ({"percentile": 0.0}, "above 0 and be at most 1, not 0.0"),
        ({"percentile": 1.5}, "above 0 and be at most 1, not 1.5"),
        ({"variance": "big", "sampler": "ddpm"}, "variance 'big' is unknown; use one of fixed_small, fixed_large"),
        ({"variance": "fixed_large"}, "a setting of ddpm; ddim has none"),
        ({"gamma": GAMMA}, "gamma is a setting of analytic_dpm; ddim has none"),
    ],
)
def test_settings_out_of_range_are_refused_with_value_and_range(settings: dict, named: str):
    with pytest.raises(Refused, match=named):
        Sampling(**settings)


def test_more_steps_than_timesteps_are_refused_before_anything_is_drawn(model: UnCLIP):
    seen: list[object] = []
    for name in model.components:
        with pytest.raises(Refused, match=f"{name} has 1000 timesteps, and cannot take 1001 steps"):
            model.generate(["a red circle"], sampling={name: Sampling(steps=1001)}, callback=seen.append)
    assert seen == []


def test_settings_that_a_component_has_no_use_for_are_refused(model: UnCLIP):
    for name, settings in {
        "upsampler-64": Sampling(rescale=0.5),
        "upsampler-32": Sampling(interval=(0, 10)),
        "prior": Sampling(percentile=0.9),
    }.items():
        with pytest.raises(Refused, match=name):
            check_sampling(name, settings)
        with pytest.raises(Refused, match=name):
            model.generate(["a red circle"], sampling={name: settings})
