"""Upsamplers at any size: strips give what one piece gives, and sides that the levels cannot halve are filled up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.fixtures.release import write_release
from unclip import UnCLIP
from unclip.diffusion.settings import Sampling
from unclip.errors import Refused
from unclip.models.layers import bfloat16_convolutions
from unclip.models.strips import apply_in_strips
from unclip.models.unet import UNet
from unclip.models.upsampler import Upsampler, UpsamplerConfig, pad_to_multiple
from unclip.presets import PAPER, TINY

DEEP = replace(TINY.upsamplers[0], multiples=(1, 2, 3), depth=2, learned_range=True)
CONFIGS = {
    "tiny": TINY.upsamplers[0],
    "deep, variances": DEEP,
    "unshuffled": replace(DEEP, unshuffle=2, prediction="v"),
    "time added, two networks": replace(DEEP, scale_shift=False, time_multiple=6, antialias=True, last=True),
    "4 times": replace(TINY.upsamplers[0], low=16, size=64, multiples=(1, 1, 2)),
}


def shaken(config: UpsamplerConfig) -> Upsampler:
    """Every parameter random: at its start an upsampler's output is 0 whatever comes in."""
    model, generator = Upsampler(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(config: UpsamplerConfig, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator, f = torch.Generator().manual_seed(1), config.factor
    low = torch.rand(2, 3, height, width, generator=generator) * 2 - 1
    return torch.randn(2, 3, f * height, f * width, generator=generator), torch.tensor([0, 700]), low


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (48, 24), (24, 40)])
@pytest.mark.parametrize("workspace", [1, 100_000])
def test_strips_give_what_one_piece_gives(name, height, width, workspace):
    """Every kind of block, strips of 8 rows and more, squares and oblongs; float32 sums in another order."""
    model = shaken(CONFIGS[name])
    x, t, low = inputs(model.config, height, width)
    with torch.no_grad():
        whole = model.denoise(x, t, low)
    strips = model.denoise_in_strips(x, t, low, workspace=workspace, hold="cpu")
    assert whole.eps.std() > 0.1
    for one, other in zip(whole, strips, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).abs().max() < 1e-4 * max(1, one.abs().max())


@torch.no_grad()
def test_strips_see_the_whole_picture_through_its_norms():
    """A change in one corner reaches the opposite one, far beyond what convolutions see."""
    model = shaken(TINY.upsamplers[0])
    x, t, low = inputs(model.config, 64, 64)
    other = low.clone()
    other[:, :, :16, :16] = 1
    outputs = [model.denoise_in_strips(x, t, y, workspace=1).eps[:, :, -32:, -32:] for y in (low, other)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    assert torch.allclose(outputs[1], model.denoise(x, t, other).eps[:, :, -32:, -32:], atol=1e-4)


@torch.no_grad()
def test_strips_multiply_in_bfloat16_where_the_network_does():
    """Rounding to bfloat16 turns the last bit of a sum into a step, so errors are compared, not numbers."""
    model = shaken(replace(TINY.upsamplers[0], channels=32))
    x, t, low = inputs(model.config, 24, 24)
    exact = model.denoise(x, t, low).eps
    bfloat16_convolutions(model)
    calls = [model.denoise(x, t, low).eps, model.denoise_in_strips(x, t, low, workspace=1).eps]
    whole, strips = [(made - exact).abs().mean().item() for made in calls]
    assert 1e-5 < whole < 0.01
    assert strips == pytest.approx(whole, rel=0.2)


def test_a_picture_in_strips_does_not_depend_on_its_neighbours():
    model = shaken(DEEP)
    x, t, low = inputs(model.config, 32, 16)
    together = model.denoise_in_strips(x, t, low, workspace=1).eps
    alone = model.denoise_in_strips(x[1:], t[1:], low[1:], workspace=1).eps
    assert torch.equal(together[1:], alone)


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> UnCLIP:
    return UnCLIP.load(write_release(tmp_path_factory.mktemp("upsampler") / "release"))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 23), (16, 32), (33, 16), (1, 5), (7, 1)])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_pictures_of_any_size_are_enlarged_in_one_piece_or_in_strips(cascade: UnCLIP, height, width, sampler):
    # v, since ε at the noisiest step, divided by an α of 5e-5, makes any rounding visible.
    model = shaken(replace(DEEP, prediction="v", learned_range=sampler == "ddpm"))
    low = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1
    seen: list[torch.Size] = []
    settings = Sampling(sampler, 3)

    def callback(_component: str, _step: int, _steps: int, x0: torch.Tensor) -> None:
        seen.append(x0.shape)

    whole = cascade.sample_upsampler(model, low, [1, 2], settings, callback)
    strips = cascade.sample_upsampler(model, low, [1, 2], settings, workspace=1)
    assert whole.shape == strips.shape == (2, 3, 2 * height, 2 * width)
    assert seen == [whole.shape] * 3
    assert (whole - strips).abs().max() < 1e-4 * max(1, whole.abs().max())
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("sides", [(8, 8), (9, 15), (8, 13)])
def test_filling_up_mirrors_as_torch_pads(sides):
    low = torch.randn(1, 3, *sides)
    wanted = F.pad(low, [0, -sides[1] % 8, 0, -sides[0] % 8], mode="reflect")
    assert torch.equal(pad_to_multiple(low, 8), wanted)
    assert pad_to_multiple(low[:, :, :1, :3], 8).shape == (1, 3, 8, 8)


def test_the_papers_upsamplers_take_any_multiple_of_their_grain():
    assert [config.grain for config in PAPER.upsamplers] == [2, 8]
    with torch.device("meta"):
        for config in PAPER.upsamplers:
            x, _, low = torch.empty(1, 3, 96 * 4, 40 * 4), None, torch.empty(1, 3, 96, 40)
            assert Upsampler(config)(x, torch.zeros(1), low).shape == x.shape


def test_the_impossible_is_refused():
    model = shaken(DEEP)
    x, t, low = inputs(DEEP, 16, 16)
    with pytest.raises(Refused, match="divide by 2, and makes them 2 times"):
        model(x, t, low[:, :, :15])
    with pytest.raises(Refused, match=r"\[18, 16\] px to \[32, 32\] px"):
        model.denoise_in_strips(x, t, torch.zeros(2, 3, 18, 16))
    with pytest.raises(Refused, match="at least 1 byte"):
        model.denoise_in_strips(x, t, low, workspace=0)
    with pytest.raises(Refused, match="attention"):
        apply_in_strips(UNet(TINY.decoder.unet), torch.zeros(1, 3, 16, 16), t[:1], workspace=1)
