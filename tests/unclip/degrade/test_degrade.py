"""Corruption of the condition: what it does to a picture, and that nothing but the picture's seed decides it."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats

from unclip.degrade.bsr import (
    BSR_FULL,
    BSR_LIGHT,
    OPERATIONS,
    BsrRanges,
    Plan,
    bsr_degrade,
    gaussian_blur,
    gaussian_noise,
)
from unclip.degrade.filters import filtered, gaussian_kernel, mirrored, resampled
from unclip.degrade.jpeg import CHROMINANCE, LUMINANCE, jpeg, quantisation
from unclip.errors import Refused

NOTHING = BsrRanges(isotropic=0, anisotropic=0, shrink=1, noise=(0, 0), quality=(100, 100))
"""Ranges that change nothing; the tests below turn single operations on."""


def pictures(count: int, height: int = 40, width: int = 48, seed: int = 0) -> torch.Tensor:
    """Waves, a hard edge and some grain, in [-1, 1]: whole levels of 255, as decoded pictures are."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    made = []
    for _ in range(count):
        period, phase = random.uniform(4, 16, (2, 3)), random.uniform(0, 6, 3)
        waves = [np.sin(x / period[0][c] + phase[c]) * np.cos(y / period[1][c]) for c in range(3)]
        made.append(127 + 90 * np.stack(waves) + random.normal(0, 8, (3, height, width)))
        made[-1][:, height // 4 : height // 2, width // 4 : width // 2] = random.uniform(0, 255, (3, 1, 1))
    return torch.from_numpy(np.stack(made).clip(0, 255).round()).float() / 127.5 - 1


def levels(images: torch.Tensor) -> np.ndarray:
    return ((images + 1) * 127.5).round().numpy().astype(int)


@pytest.mark.parametrize("quality", [5, 30, 50, 75, 90, 95, 100])
@pytest.mark.parametrize(("height", "width"), [(48, 64), (37, 53), (8, 8)])
def test_jpeg_is_what_pillows_encoder_and_decoder_make_of_a_picture(quality, height, width):
    """Within 1 level of 255 on average, and an eighth of what the compression itself changes.

    Single blocks may differ by a quantisation step: libjpeg's integer DCT rounds near-ties its own way.
    """
    images = pictures(8, height, width)
    ours, lost, off = levels(jpeg(images, [quality] * 8)), [], []
    for image, made in zip(levels(images), ours, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0).astype(np.uint8)).save(buffer, "jpeg", quality=quality)
        theirs = np.asarray(Image.open(buffer)).transpose(2, 0, 1).astype(int)
        off.append(np.abs(made - theirs).mean())
        lost.append(np.abs(image - theirs).mean())
    assert np.mean(off) < 1
    assert np.mean(off) < np.mean(lost) / 8


def test_the_quantisation_steps_are_libjpegs_at_every_quality():
    picture = Image.new("RGB", (16, 16))
    for quality in range(1, 101):
        buffer = io.BytesIO()
        picture.save(buffer, "jpeg", quality=quality)
        tables = Image.open(buffer).quantization
        for number, base in enumerate((LUMINANCE, CHROMINANCE)):
            assert [step for row in quantisation(base, quality) for step in row] == list(tables[number])


@pytest.mark.parametrize("ranges", [BSR_LIGHT, BSR_FULL], ids=["light", "full"])
def test_a_corruption_depends_on_nothing_but_picture_and_seed(ranges):
    images, seeds = pictures(9), [3, 1, 4, 1, 5, 9, 2, 6, 2**62]
    together = bsr_degrade(images, seeds, ranges)
    assert torch.equal(together, bsr_degrade(images, seeds, ranges))
    alone = [bsr_degrade(image[None], [seed], ranges) for image, seed in zip(images, seeds, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together.flip(0), bsr_degrade(images.flip(0), seeds[::-1], ranges))
    same = bsr_degrade(images[:1].expand(9, -1, -1, -1), seeds, ranges)
    assert torch.equal(same[1], same[3])
    assert len({picture.numpy().tobytes() for picture in same}) == 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_a_corruption_is_the_same_on_every_device():
    images = pictures(6)
    there = bsr_degrade(images.to("cuda"), range(6), BSR_FULL).cpu()
    assert (levels(there) != levels(bsr_degrade(images, range(6), BSR_FULL))).mean() < 1e-3


@pytest.mark.parametrize("ranges", [BSR_LIGHT, BSR_FULL], ids=["light", "full"])
def test_strength_0_leaves_a_picture_as_it_is_and_more_changes_it_more(ranges):
    images = pictures(12)
    assert torch.equal(bsr_degrade(images, range(12), ranges.scaled(0)), images)
    assert ranges.scaled(1) == ranges
    change = [
        (bsr_degrade(images, range(12), ranges.scaled(s)) - images).square().mean().item() for s in (0.25, 0.5, 1, 2)
    ]
    assert change == sorted(change)
    assert change[0] > 0


def test_bsrgans_ranges_spoil_more_than_the_light_ones_and_those_more_than_the_blur():
    images = pictures(24)
    sigmas = torch.linspace(0, 0.6, 24)
    made = [
        gaussian_blur(images, sigmas),
        bsr_degrade(images, range(24), BSR_LIGHT),
        bsr_degrade(images, range(24), BSR_FULL),
    ]
    errors = [(picture - images).square().mean().item() for picture in made]
    assert errors[0] < errors[1] < 0.5 * errors[2]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**63 - 1))
def test_any_size_keeps_its_shape_and_range(height, width, seed):
    image = torch.rand(1, 3, height, width) * 2 - 1
    made = bsr_degrade(image, [seed], BSR_FULL)
    assert made.shape == image.shape
    assert made.abs().max() <= 1


def test_a_plain_picture_keeps_its_colour_and_nothing_moves():
    ranges = BsrRanges(noise=(0, 0), isotropic=2.2, anisotropic=5, blurs=2)
    plain = torch.tensor([0.5, -0.25, 0.75])[None, :, None, None].expand(8, 3, 32, 32)
    assert (bsr_degrade(plain, range(8), ranges) - plain).abs().max() < 2.5 / 127.5
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    spot = torch.exp(-0.5 * ((y - 32) ** 2 + (x - 24) ** 2) / 25).expand(16, 3, 64, 64)
    made = bsr_degrade(spot * 1.8 - 0.9, range(16), ranges) + 0.9
    weight = (made / made.sum((2, 3), keepdim=True)).double()
    assert torch.allclose((weight * y).sum((2, 3)), torch.tensor(32.0).double(), atol=0.35)
    assert torch.allclose((weight * x).sum((2, 3)), torch.tensor(24.0).double(), atol=0.35)


def test_noise_is_as_strong_as_asked():
    """48 pictures of 64² pixels: a picture's deviation has a relative standard error of at most 1.1 % (grey). A level
    that is 10 % off would be seen in every one; by chance a test at 5 % fails once in 3,000 runs."""
    ranges = BsrRanges(isotropic=0, anisotropic=0, shrink=1, noise=(10, 10), quality=(100, 100))
    grey = torch.zeros(48, 3, 64, 64)
    noise = bsr_degrade(grey, range(48), ranges) * 127.5
    kinds = [Plan.drawn(seed, ranges).mixing for seed in range(48)]
    full = [np.allclose(np.square(kind).sum(1), 100) for kind in kinds]
    assert 28 <= sum(full) < 48
    for field, kind, strong in zip(noise, kinds, full, strict=True):
        wanted = np.array(kind) @ np.array(kind).T
        found = np.cov(field.reshape(3, -1).numpy())
        assert np.allclose(found, wanted, atol=8)
        assert wanted.diagonal().max() <= 100 + 1e-9
        if strong:
            assert field.std(dim=(1, 2)).numpy() == pytest.approx(10, rel=0.05)


def test_noise_is_independent_between_pixels_and_pictures():
    """64² pixels: a correlation has a standard error of 0.016; 0.1 would be found for certain."""
    a, b = (gaussian_noise(seed, np.eye(3).tolist(), 64, 64)[0] for seed in (1, 2))
    for first, second in ((a, b), (a[1:], a[:-1]), (a[:, 1:], a[:, :-1])):
        assert abs(np.corrcoef(first.flatten(), second.flatten())[0, 1]) < 0.07


def test_plans_are_drawn_as_bsrgan_draws_them():
    """800 plans; Kolmogorov–Smirnov at 1e-3 finds a distribution that is off by 0.1 anywhere; counts lie within 4.5
    standard errors."""
    plans = [Plan.drawn(seed, BSR_FULL) for seed in range(800)]

    def share(found: list[bool], wanted: float) -> bool:
        return abs(np.mean(found) - wanted) <= 4.5 * (wanted * (1 - wanted) / len(found)) ** 0.5

    blurs = [covariance for plan in plans for covariance in plan.covariances]
    round_ = [(yy**0.5) for yy, xx, yx in blurs if yy == xx and yx == 0]
    assert len(blurs) == 1600
    assert share([yy == xx and yx == 0 for yy, xx, yx in blurs], 0.5)
    assert stats.kstest(np.array(round_) / 2.2, "uniform").pvalue > 1e-3
    axes = np.array([np.linalg.eigvalsh([[yy, yx], [yx, xx]]) for yy, xx, yx in blurs if yx])
    assert stats.kstest((axes / 5).max(1) ** 2, "uniform").pvalue > 1e-3
    factors = np.array([plan.shrink for plan in plans if plan.shrink != 1])
    assert share([plan.shrink != 1 for plan in plans], 0.8)
    assert stats.kstest(factors - 1, "uniform").pvalue > 1e-3
    assert share([np.count_nonzero(plan.mixing) == 3 and plan.mixing[1][0] == 0 for plan in plans], 0.4)
    assert share([plan.mixing[1][0] == plan.mixing[0][0] for plan in plans], 0.4)
    qualities = [plan.qualities[1] for plan in plans]
    assert (min(qualities), max(qualities)) == (30, 95)
    assert stats.kstest((np.array(qualities) - 30 + 0.5) / 66, "uniform").pvalue > 1e-3
    assert share([plan.qualities[0] < 100 for plan in plans], 0.9)
    for name in OPERATIONS:
        first = {"shrink": 2 / 6, "restore": 0}.get(name, 1 / 6)
        assert share([plan.order[0] == name for plan in plans], first)
    assert all(plan.order.index("shrink") < plan.order.index("restore") for plan in plans)


@pytest.mark.parametrize("covariance", [(0.36, 0.36, 0.0), (4.0, 4.0, 0.0), (4.0, 1.5, 1.0), (2.0, 5.0, -2.5)])
def test_a_blur_spreads_a_point_by_the_covariance_asked(covariance):
    point = torch.zeros(1, 1, 41, 41)
    point[..., 20, 20] = 1
    made = filtered(point, gaussian_kernel(covariance, 12)[None], [(41, 41)])[0, 0].double()
    y, x = torch.meshgrid(torch.arange(41.0) - 20, torch.arange(41.0) - 20, indexing="ij")
    found = [(made * product).sum().item() for product in (y * y, x * x, y * x)]
    assert made.sum() == pytest.approx(1, abs=1e-5)
    assert found == pytest.approx(covariance, rel=0.05, abs=1e-3)


def test_filters_mirror_at_each_pictures_own_edge():
    images, sizes = pictures(3, 24, 30), [(24, 30), (17, 9), (5, 30)]
    kernels = torch.rand(3, 7, 7)
    made = filtered(images, kernels, sizes)
    for image, kernel, (h, w), found in zip(images, kernels, sizes, made, strict=True):
        wanted = [ndimage.correlate(channel[:h, :w].numpy(), kernel.numpy(), mode="mirror") for channel in image]
        assert np.allclose(found[:, :h, :w], np.stack(wanted), atol=1e-4)


def test_the_light_blur_is_scipys_gaussian_filter():
    images, sigmas = pictures(4, 12, 15), torch.tensor([0.0, 0.2, 0.45, 0.6])
    made = gaussian_blur(images, sigmas)
    for image, sigma, found in zip(images, sigmas.tolist(), made, strict=True):
        wanted = ndimage.gaussian_filter(image.numpy(), (0, sigma, sigma), mode="mirror", radius=(0, 1, 1))
        assert np.allclose(found, wanted, atol=1e-5)


def test_resampling_interpolates_as_torch_does_each_picture_to_its_own_size():
    images = pictures(4, 24, 32)
    before, after = [(24, 32), (20, 11), (24, 32), (12, 16)], [(13, 17), (24, 32), (12, 16), (24, 32)]
    for way, mode in (("linear", "bilinear"), ("cubic", "bicubic")):
        made = resampled(images, before, after, [way] * 4)
        for image, (h, w), (m, n), found in zip(images, before, after, made, strict=True):
            wanted = F.interpolate(image[None, :, :h, :w], size=(m, n), mode=mode, align_corners=False)[0]
            assert torch.allclose(found[:, :m, :n], wanted, atol=1e-4)
    halves = resampled(images, [(24, 32)] * 4, [(12, 16)] * 4, ["area"] * 4)[:, :, :12, :16]
    assert torch.allclose(halves, F.avg_pool2d(images, 2), atol=1e-5)


def test_averaging_areas_is_exact_at_any_factor():
    image = pictures(1, 30, 30)[0]
    made = resampled(image[None], [(30, 30)], [(17, 23)], ["area"])[0, :, :17, :23]
    for channel, found in zip(image, made, strict=True):
        # Every pixel repeated 17 times down and 23 times across divides evenly into 17 × 23 cells.
        wanted = np.kron(channel.numpy(), np.ones((17, 23))).reshape(17, 30, 23, 30).mean((1, 3))
        assert np.allclose(found, wanted, atol=1e-5)


@given(st.integers(-200, 200), st.integers(2, 30))
def test_mirrored_places_are_numpys_reflection(place, length):
    padded = np.pad(np.arange(length), 230, mode="reflect")
    assert mirrored(np.array(place), length) == padded[place + 230]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: gaussian_blur(torch.zeros(1, 3, 8, 8), torch.ones(1), kernel=4), "must be odd"),
        (lambda: gaussian_blur(torch.zeros(1, 3, 1, 8), torch.ones(1)), "picture's side"),
        (lambda: BsrRanges(isotropic=-1), "isotropic"),
        (lambda: BsrRanges(anisotropic=float("nan")), "anisotropic"),
        (lambda: BsrRanges(blurs=3), "blurs"),
        (lambda: BsrRanges(shrink=0.5), "shrink"),
        (lambda: BsrRanges(shrunk=1.5), "shrunk"),
        (lambda: BsrRanges(noise=(3, 2)), "noise"),
        (lambda: BsrRanges(noise=(-1, 2)), "noise"),
        (lambda: BsrRanges(quality=(0, 50)), "quality"),
        (lambda: BSR_LIGHT.scaled(-0.5), "strength"),
        (lambda: BSR_LIGHT.scaled(float("inf")), "strength"),
        (lambda: bsr_degrade(torch.zeros(2, 3, 8, 8), [1]), "b seeds"),
        (lambda: bsr_degrade(torch.zeros(1, 1, 8, 8), [1]), "b, 3, h, w"),
        (lambda: jpeg(torch.zeros(1, 3, 8, 8), [0]), "quality"),
        (lambda: jpeg(torch.zeros(1, 3, 8, 8), [101]), "quality"),
        (lambda: jpeg(torch.zeros(1, 4, 8, 8), [50]), "b, 3, h, w"),
        (lambda: filtered(torch.zeros(1, 3, 8, 8), torch.ones(1, 4, 4), [(8, 8)]), "odd square"),
        (lambda: resampled(torch.zeros(1, 3, 8, 8), [(8, 8)], [(9, 4)], ["area"]), "do not fit"),
    ],
)
def test_the_impossible_is_refused(make, named):
    with pytest.raises(Refused, match=named):
        make()
