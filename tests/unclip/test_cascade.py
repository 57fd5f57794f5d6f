"""Text to pictures: what decides a picture, and what must not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.fixtures.release import SAMPLING, write_release
from unclip import UnCLIP, manipulate
from unclip.diffusion.settings import Sampling
from unclip.errors import Refused
from unclip.models.layers import ContextAttention
from unclip.pictures import to_uint8
from unclip.progress import Progress

PROMPTS = ["a red circle", "a small blue square on a white background", "two green stars", "", "a purple ring"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("cascade") / "release")


@pytest.fixture
def model(folder: Path) -> UnCLIP:
    model = UnCLIP.load(folder)
    model.tile = 2
    return model


def test_pictures_have_the_last_upsamplers_size(model: UnCLIP):
    pictures = model.generate(PROMPTS[:3])
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (3, 3, model.size, model.size) == (3, 3, 64, 64)
    assert model.generate([]).shape == (0, 3, 64, 64)


def test_a_picture_does_not_depend_on_its_neighbours(model: UnCLIP):
    seeds = [7, 7, 3, 9, 11]
    together = model.generate(PROMPTS, seeds=seeds)
    alone = torch.cat([model.generate([p], seeds=[s]) for p, s in zip(PROMPTS, seeds, strict=True)])
    reverse = model.generate(PROMPTS[::-1], seeds=seeds[::-1]).flip(0)
    assert torch.equal(together, alone)
    assert torch.equal(together, reverse)


def test_prompt_and_seed_decide_the_picture(model: UnCLIP):
    pictures = model.generate(["a red circle", "a red circle", "a blue circle"], seeds=[1, 2, 1])
    assert len({picture.numpy().tobytes() for picture in pictures}) == 3
    assert torch.equal(model.generate(["a red circle"]), model.generate(["a red circle"], seeds=[0]))


def test_settings_of_a_call_replace_the_releases(model: UnCLIP):
    default = model.generate(PROMPTS[:1])
    assert torch.equal(model.generate(PROMPTS[:1], guidance=2.0, prior_guidance=1.0), default)
    assert not torch.equal(model.generate(PROMPTS[:1], guidance=3.0), default)
    assert not torch.equal(model.generate(PROMPTS[:1], prior_guidance=9.0), default)
    assert not torch.equal(model.generate(PROMPTS[:1], sampling={"upsampler-64": Sampling(steps=1)}), default)
    assert torch.equal(model.generate(PROMPTS[:1]), default)


def test_the_prior_keeps_the_candidate_that_the_text_likes_best(model: UnCLIP):
    text = model.clip.encode_text(["a red circle", "a blue square"])
    likes = {}
    for count in (1, 2, 3, 4):
        z = model.sample_prior(text, [0, 1], Sampling(steps=3, candidates=count))
        likes[count] = (z * text.embedding).sum(1)
    assert all((likes[n + 1] >= likes[n]).all() for n in (1, 2, 3))
    assert (likes[4] > likes[1]).any()


def test_a_callback_sees_every_step_of_every_model(model: UnCLIP):
    seen: list[Progress] = []
    model.generate(PROMPTS[:3], callback=seen.append)
    # The prior takes its steps once a candidate.
    steps = {"prior": [1, 2, 3, 1, 2, 3], "decoder": [1, 2, 3], "upsampler-32": [1, 2], "upsampler-64": [1, 2]}
    for tile in (0, 1):
        told = [(p.component, p.step) for p in seen if p.tile == tile]
        assert told == [(name, step) for name, numbers in steps.items() for step in numbers]
    assert {p.tiles for p in seen} == {2}
    assert all(p.steps == SAMPLING[p.component].steps for p in seen)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sampler": "euler"}, "euler"),
        ({"steps": 0}, "steps is 0"),
        ({"guidance": float("nan")}, "finite"),
        ({"guidance": -1.0}, "finite"),
        ({"eta": 2.0}, "between 0 and 1"),
        ({"sampler": "ddpm", "eta": 0.5}, "setting of ddim"),
        ({"candidates": 0}, "candidates"),
    ],
)
def test_impossible_sampling_is_refused(settings, reason):
    with pytest.raises(Refused, match=reason):
        Sampling(**settings)


def test_impossible_calls_are_refused(model: UnCLIP):
    with pytest.raises(Refused, match="1 prompts and 2 seeds"):
        model.generate(["a"], seeds=[1, 2])
    with pytest.raises(Refused, match="finite"):
        model.generate(["a"], guidance=float("inf"))
    with pytest.raises(Refused, match="upsampler-99"):
        model.generate(["a"], sampling={"upsampler-99": Sampling()})


def test_models_that_do_not_fit_are_refused(model: UnCLIP):
    with pytest.raises(Refused, match="takes pictures of 32 px, and the decoder gives 16 px"):
        UnCLIP(model.clip, model.prior, model.decoder, model.upsamplers[1:])
    with pytest.raises(Refused, match="no condition to be guided by"):
        UnCLIP(model.clip, model.prior, model.decoder, model.upsamplers, {"upsampler-32": Sampling(guidance=2)})


def test_an_empty_prompt_draws_anything(model: UnCLIP):
    drawn = model.generate([""], seeds=[3], prior_guidance=1.0)
    assert torch.equal(drawn, manipulate.unconditional(model, 1, seeds=[3]))


def test_the_unseen_end_of_a_long_prompt_is_told_once(model: UnCLIP, caplog: pytest.LogCaptureFixture):
    long = "a red circle " * 20 + "zzz"
    calls = [
        lambda: model.generate([long, "a red circle", long]),
        lambda: model.decode(torch.zeros(1, 32), [long], seeds=[0]),
        lambda: manipulate.interpolate_prompts(model, "a red circle", long, steps=2),
        lambda: manipulate.text_diff(model, torch.zeros(3, 8, 8, dtype=torch.uint8), long, "a star", steps=2),
    ]
    for call in calls:
        caplog.clear()
        call()
        (told,) = caplog.records
        assert told.levelname == "WARNING"
        assert told.getMessage().endswith("zzz' at its end is not seen")


def test_pictures_that_are_no_numbers_are_refused_and_not_shown_as_black(folder: Path):
    model = UnCLIP.load(folder)
    with pytest.raises(Refused, match="not finite numbers"):
        model.generate(["a red circle"], guidance=1e38)
    with pytest.raises(Refused, match="not finite numbers"):
        model.decode(torch.full((1, 32), float("nan")), [""], seeds=[0])
    for part in (model.prior.out.bias, model.decoder.unet.conv_out.bias, model.upsamplers[-1].unet.conv_out.bias):
        kept = part.clone()
        part.data[0] = float("nan")
        with pytest.raises(Refused, match="a model is damaged"):
            model.generate(["a red circle"])
        part.data.copy_(kept)
    assert model.generate(["a red circle"]).float().std() > 0


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_keys_and_values_of_the_context_are_made_once_a_run_and_not_once_a_step(model: UnCLIP, guidance: float):
    """Once for the condition and once for nothing, in every attention, whatever the number of steps."""
    attentions = [part for part in model.decoder.modules() if isinstance(part, ContextAttention)]
    calls: list[int] = []
    hooks = [part.context_kv.register_forward_hook(lambda *_: calls.append(1)) for part in attentions]
    text = model.clip.encode_text(["a red circle"])
    for steps in (1, 2, 9):
        calls.clear()
        model.sample_decoder(text.embedding, text, [0], Sampling(steps=steps, guidance=guidance))
        assert len(calls) == 2 * len(attentions) > 0
    for hook in hooks:
        hook.remove()


def test_pixels_are_rounded_to_the_nearest_and_clamped():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, 127.6 / 127.5 - 1])
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255, 128]
