"""Variations, interpolations, text diffs and edits: what stays, what changes, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.fixtures.release import shaken, write_release
from unclip import UnCLIP, manipulate
from unclip.diffusion.guidance import clip_x0, conditional
from unclip.diffusion.samplers import ddim
from unclip.diffusion.settings import Sampling
from unclip.errors import Refused
from unclip.manipulate import slerp
from unclip.models.decoder import Decoder
from unclip.pictures import resized, to_unit

STEPS = {"decoder": Sampling("ddim", 10)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> UnCLIP:
    """A release of random weights, 16 → 32 → 64 px, whose decoder is smooth.

    It predicts v, a twentieth of what random weights would say: a field of noise bent a little by what it is told, and
    so, as a trained one, nearly a bijection between noise and pictures.
    """
    model = UnCLIP.load(write_release(tmp_path_factory.mktemp("manipulate") / "release"))
    model.tile = 2
    decoder = Decoder(replace(model.decoder.config, prediction="v", learned_range=False))
    shaken(decoder, 5)
    model.decoder = decoder.requires_grad_(False).eval()
    for parameter in decoder.unet.conv_out.parameters():
        parameter.mul_(0.05)
    model.sampling |= STEPS
    return model


@pytest.fixture(scope="module")
def model(whole: UnCLIP) -> UnCLIP:
    """The same without its upsamplers, which would bury what the decoder drew under their own random fields."""
    sampling = {name: whole.sampling[name] for name in ("prior", "decoder")}
    return UnCLIP(whole.clip, whole.prior, whole.decoder, [], sampling, tile=2)


def smooth(n: int, side: int = 64, seed: int = 0) -> Tensor:
    """Pictures uint8 [n, 3, side, side] of soft random blobs, none of them near black or white."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 80 + 100 * torch.rand(n, 3, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(60, 200).to(torch.uint8)


def base(model: UnCLIP, latents: manipulate.Latents) -> Tensor:
    """The decoder's pictures in [-1, 1] of latents, by DDIM without noise."""
    text = [part.expand(len(latents.start), *part.shape[1:]) for part in model.decoder.null_text.expand(1)]
    context = model.decoder.context(latents.embedding, *text)
    denoise = clip_x0(conditional(model.decoder.denoise, context), model.decoder.schedule)
    return ddim(denoise, latents.start, model.decoder.schedule.respace(10))


@torch.no_grad()
def test_the_two_latents_give_the_picture_back(model: UnCLIP):
    pictures = smooth(3)
    latents = manipulate.encode(model, pictures)
    assert latents.embedding.shape == (3, 32)
    again = base(model, latents)
    wanted = to_unit(resized(pictures, 16))
    assert (again - wanted).abs().max() < 0.02
    other = latents._replace(start=latents.start.roll(1, 0))
    assert (base(model, other) - wanted).abs().max() > 0.1  # so x_T holds the picture, not z_i alone


def test_variations_keep_z_and_differ_by_their_noise(model: UnCLIP):
    pictures = smooth(2)
    varied = manipulate.variations(model, pictures, n=2, seeds=[1, 2, 1, 2])
    assert varied.shape == (4, 3, 16, 16)
    assert not torch.equal(varied[0], varied[1])
    alone = manipulate.variations(model, pictures[1:], n=2, seeds=[1, 2])
    assert torch.equal(varied[2:], alone)


def test_without_noise_a_variation_is_the_picture_itself(model: UnCLIP):
    one, two = manipulate.variations(model, smooth(1), n=2, eta=0.0, seeds=[0, 0])
    assert torch.equal(one, two)


def test_an_interpolation_begins_and_ends_at_its_pictures(model: UnCLIP):
    pictures = smooth(2)
    way = manipulate.interpolate(model, pictures[0], pictures[1], steps=4)
    ends = manipulate.variations(model, pictures, n=1, eta=0.0, seeds=[0, 0])
    assert way.shape == (4, 3, 16, 16)
    assert (way[0].int() - ends[0].int()).abs().max() <= 1
    assert (way[-1].int() - ends[1].int()).abs().max() <= 1
    fixed = manipulate.interpolate(model, pictures[0], pictures[1], steps=2, fixed=True)
    assert not torch.equal(fixed[0], way[0])


def test_an_interpolation_of_prompts_begins_and_ends_at_theirs(model: UnCLIP):
    way = manipulate.interpolate_prompts(model, "a red circle", "a blue square", steps=3, seed=4)
    text = model.clip.encode_text(["a red circle", "a blue square"])
    ends = model.sample_prior(text, [4, 4], model.sampling["prior"])
    for end, picture in ((0, way[0]), (1, way[-1])):
        direct = model.decode(ends[end : end + 1], [""], seeds=[4])
        assert (direct[0].int() - picture.int()).abs().max() <= 1


def test_a_text_diff_begins_at_the_picture_and_leaves_it(model: UnCLIP):
    picture = smooth(1)[0]
    way = manipulate.text_diff(model, picture, "a red circle", "a blue circle", steps=3)
    start = manipulate.variations(model, picture[None], n=1, eta=0.0)[0]
    assert (way[0].int() - start.int()).abs().max() <= 1
    assert not torch.equal(way[0], way[-1])


def test_inpainting_leaves_what_is_not_masked_and_draws_the_rest(whole: UnCLIP):
    pictures = smooth(2)
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[:, 20:40, 20:40] = True
    drawn = manipulate.inpaint(whole, pictures, masks, ["a red circle", "a blue square"])
    stays = ~masks[:, None].expand_as(drawn)
    assert torch.equal(drawn[stays], pictures[stays])
    assert (drawn[~stays] != pictures[~stays]).float().mean() > 0.5
    alone = manipulate.inpaint(whole, pictures[1:], masks[1:], ["a blue square"], seeds=[1])
    assert torch.equal(drawn[1:], alone)


def test_a_weaker_redrawing_stays_nearer_to_the_picture(model: UnCLIP):
    pictures = smooth(2)
    prompts = ["a red circle", "a blue square"]
    small = resized(pictures, 16).float()
    distance = []
    for strength in (0.1, 0.5, 1.0):
        drawn = manipulate.redraw(model, pictures, prompts, strength=strength)
        distance.append(float((drawn.float() - small).abs().mean()))
    assert distance == sorted(distance), distance
    assert distance[0] < 0.5 * distance[-1]


def test_redrawing_all_of_a_picture_still_depends_on_nothing_but_noise_and_prompt(model: UnCLIP):
    one = manipulate.redraw(model, smooth(1), ["a red circle"], strength=1.0)
    two = manipulate.redraw(model, smooth(1, seed=9), ["a red circle"], strength=1.0)
    assert (one.float() - two.float()).abs().mean() < 2  # of 255: the last noise level is not quite all noise


def test_the_probe_with_every_direction_is_the_picture(model: UnCLIP):
    pictures = smooth(2)
    basis, _ = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))
    shown = manipulate.probe(model, pictures, basis, torch.zeros(32), [0, 8, 32])
    whole = manipulate.variations(model, pictures, n=1, eta=0.0, seeds=[0, 0])
    assert (shown[[2, 5]].int() - whole.int()).abs().max() <= 1
    assert not torch.equal(shown[0], shown[2])


def test_a_picture_is_inverted_over_the_steps_that_it_is_drawn_with(model: UnCLIP):
    pictures = smooth(1)
    few = {"sampling": {"decoder": Sampling("ddim", 4)}}
    latents = manipulate.encode(model, pictures, steps=4)
    drawn = model.decode(latents.embedding, [""], seeds=[0], start=latents.start, **few)
    assert torch.equal(manipulate.variations(model, pictures, n=1, eta=0.0, **few), drawn)
    assert not torch.equal(manipulate.encode(model, pictures).start, latents.start)


def test_the_priors_settings_are_the_callers_in_every_manipulation(model: UnCLIP):
    settings = Sampling("ddim", 3, guidance=7.0)
    other, one = {"sampling": {"prior": settings}}, smooth(1)
    text = model.clip.encode_text(["a"] * model.tile)
    z = model.sample_prior(text, [0] * model.tile, settings)[:1]
    strong = model.decode(z, ["a"], seeds=[0])
    masks = torch.ones(1, 64, 64, dtype=torch.bool)
    assert torch.equal(manipulate.inpaint(model, one, masks, ["a"], **other), strong)
    assert not torch.equal(manipulate.inpaint(model, one, masks, ["a"]), strong)
    for draw in (
        lambda **how: manipulate.redraw(model, one, ["a"], **how),
        lambda **how: manipulate.interpolate_prompts(model, "a", "b", steps=2, **how),
    ):
        assert not torch.equal(draw(**other), draw())


def test_unconditional_pictures_differ_by_seed(model: UnCLIP):
    one, two = manipulate.unconditional(model, 2)
    assert not torch.equal(one, two)


@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0.1, 10))
def test_slerp_stays_on_the_sphere(seed: int, share: float, radius: float):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 3, 16, generator=generator, dtype=torch.float64)
    a, b = (radius * v / v.norm(dim=1, keepdim=True) for v in (a, b))
    between = slerp(a, b, share)
    torch.testing.assert_close(between.norm(dim=1), torch.full((3,), radius, dtype=torch.float64))
    angle = lambda u, v: ((u * v).sum(1) / radius**2).clamp(-1, 1).acos()  # noqa: E731
    torch.testing.assert_close(angle(a, between), share * angle(a, b), atol=1e-6, rtol=1e-6)


def test_slerp_between_near_vectors_is_the_straight_line():
    a = torch.ones(1, 4)
    b = a + 1e-7
    torch.testing.assert_close(slerp(a, b, 0.25), a)
    assert math.isclose(float(slerp(a, 3 * a, 0.5).norm()), 4.0, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: slerp(torch.ones(1, 3), -torch.ones(1, 3), 0.5), "opposite"),
        (lambda m: slerp(torch.zeros(1, 3), torch.ones(1, 3), 0.5), "length 0"),
        (lambda m: manipulate.encode(m, smooth(1).float()), "must be uint8"),
        (lambda m: manipulate.variations(m, smooth(1)[:, :1]), "must be uint8"),
        (lambda m: manipulate.encode(m, smooth(1)[:, :, :0]), "must be uint8"),
        (lambda m: manipulate.encode(m, smooth(1)[:0]), "must be uint8"),
        (lambda m: manipulate.encode(m, smooth(1), steps=0), "cannot take 0 steps"),
        (lambda m: manipulate.encode(m, smooth(1), steps=1001), "cannot take 1001 steps"),
        (lambda m: manipulate.unconditional(m, 0), "nothing to draw: 0 pictures"),
        (lambda m: manipulate.variations(m, smooth(1), n=-1), "nothing to draw: -1 pictures"),
        (lambda m: manipulate.variations(m, smooth(1), guidance=math.nan), "finite number"),
        (lambda m: manipulate.variations(m, smooth(1), eta=math.nan), "eta must lie"),
        (lambda m: manipulate.variations(m, smooth(1), eta=1.5), "eta must lie"),
        (lambda m: manipulate.variations(m, smooth(1), n=2, seeds=[1]), "one of each"),
        (lambda m: manipulate.interpolate(m, smooth(1)[0], smooth(1)[0], steps=1), "at least 2"),
        (lambda m: manipulate.text_diff(m, smooth(1)[0], "a", "a"), "the same"),
        (lambda m: manipulate.text_diff(m, smooth(1)[0], "a", "b", theta=0.0), "theta"),
        (lambda m: manipulate.redraw(m, smooth(1), ["a"], strength=0.0), "share of the steps"),
        (lambda m: manipulate.text_diff(m, smooth(1)[0], "a", "b", theta=math.nan), "theta"),
        (lambda m: manipulate.redraw(m, smooth(1), ["a"], strength=math.nan), "share of the steps"),
        (lambda m: manipulate.redraw(m, smooth(2), ["a"], strength=0.5), "one of each"),
        (lambda m: manipulate.redraw(m, smooth(3), ["a", "b"]), "3 pictures with 2 prompts and 2 seeds"),
        (lambda m: manipulate.redraw(m, smooth(1), ["a"], seeds=[1, 2]), "1 pictures with 1 prompts and 2 seeds"),
        (lambda m: manipulate.redraw(m, smooth(1), ["a"], sampling={"unet": Sampling()}), "sampling names unet"),
        (
            lambda m: manipulate.inpaint(m, smooth(1), torch.ones(1, 64, 64, dtype=torch.bool), ["a", "b"]),
            "1 pictures with 2 prompts",
        ),
        (lambda m: manipulate.inpaint(m, smooth(1), torch.zeros(1, 8, 8, dtype=torch.bool), ["a"]), "masks must be"),
        (lambda m: manipulate.probe(m, smooth(1), torch.eye(32)[:4], torch.zeros(32), [5]), "4 directions"),
    ],
)
def test_impossible_requests_are_refused(model: UnCLIP, call, said: str):
    with pytest.raises(Refused, match=said):
        call(model)
