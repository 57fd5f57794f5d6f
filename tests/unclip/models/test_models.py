"""Prior, decoder and upsampler: what may and what must not reach their outputs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from unclip.degrade.bsr import gaussian_blur
from unclip.diffusion.guidance import classifier_free, clip_x0
from unclip.errors import Refused
from unclip.models.decoder import Decoder
from unclip.models.prior import DiffusionPrior
from unclip.models.upsampler import Upsampler
from unclip.presets import PRESETS, TINY

B, L = 3, TINY.prior.context
MASK = torch.arange(L)[None] < torch.tensor([4, 9, L])[:, None]
T = torch.tensor([0, 400, 999])
POSITIONED = replace(
    TINY.decoder, unshuffle=2, multiples=(1, 2), attention=(8, 4), position=True, text_depth=1, text_heads=2
)
seeds = st.integers(0, 2**31)
DECODERS = {"plain": TINY.decoder, "positioned": POSITIONED}


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with every parameter random: at its start, zeroed layers would hide what reaches the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def text(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, 32, generator=generator), torch.randn(B, L, 32, generator=generator), MASK


@pytest.fixture(params=DECODERS)
def decoder(request) -> Decoder:
    made = shaken(Decoder(DECODERS[request.param]))
    assert isinstance(made, Decoder)
    made.null_text.set(torch.ones(32), torch.ones(L, 32), torch.arange(L) < 2)
    return made


@pytest.fixture
def prior() -> DiffusionPrior:
    made = shaken(DiffusionPrior(TINY.prior))
    assert isinstance(made, DiffusionPrior)
    return made


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=seeds, value=st.floats(-50, 50), lengths=st.lists(st.integers(1, L), min_size=B, max_size=B))
def test_padding_never_changes_a_picture(decoder, seed, value, lengths):
    embedding, states, _ = text(seed)
    mask = torch.arange(L)[None] < torch.tensor(lengths)[:, None]
    z, x = torch.randn(B, 32), torch.randn(B, 3, 16, 16)
    other = torch.where(mask[..., None], states, torch.full_like(states, value))
    first = decoder(x, T, decoder.context(z, embedding, states, mask))
    assert torch.allclose(first, decoder(x, T, decoder.context(z, embedding, other, mask)), atol=1e-5)
    assert first.std() > 0.01


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=seeds, value=st.floats(-50, 50), lengths=st.lists(st.integers(1, L), min_size=B, max_size=B))
def test_padding_never_changes_an_image_embedding(prior, seed, value, lengths):
    embedding, states, _ = text(seed)
    mask = torch.arange(L)[None] < torch.tensor(lengths)[:, None]
    z = torch.randn(B, 32)
    other = torch.where(mask[..., None], states, torch.full_like(states, value))
    assert torch.allclose(prior(z, T, embedding, states, mask), prior(z, T, embedding, other, mask), atol=1e-5)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=seeds, place=st.integers(0, L - 1), change=st.sampled_from([-2.0, 1.0, 30.0]))
def test_the_prior_is_causal(prior, seed, place, change):
    """What a token becomes must not depend on a later one: only the query, the last, sees all."""
    kept: list[torch.Tensor] = []
    hook = prior.blocks[-1].register_forward_hook(lambda module, inputs, output: kept.append(output))
    embedding, states, _ = text(seed)
    mask = torch.ones(B, L, dtype=torch.bool)
    z = torch.randn(B, 32)
    changed = states.clone()
    changed[:, place] += change
    first, second = prior(z, T, embedding, states, mask), prior(z, T, embedding, changed, mask)
    hook.remove()
    assert torch.allclose(kept[0][:, :place], kept[1][:, :place], atol=1e-6)
    assert not torch.allclose(kept[0][:, place], kept[1][:, place], atol=1e-2)
    assert not torch.allclose(first, second, atol=1e-5)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=seeds, scale=st.floats(0, 8), step=st.integers(0, 999))
@torch.no_grad()
def test_condition_and_nothing_in_one_call_are_two_calls_of_the_real_networks(decoder, prior, seed, scale, step):
    embedding, states, mask = text(seed)
    prior.null_text.set(torch.ones(32), torch.ones(L, 32), torch.arange(L) < 2)
    t, generator = torch.full((B,), step), torch.Generator().manual_seed(seed)
    for model, context, shape in (
        (decoder, decoder.context(embedding, embedding, states, mask), (B, 3, 16, 16)),
        (prior, prior.context(embedding, states, mask), (B, 32)),
    ):
        x, null = torch.randn(shape, generator=generator), model.null_context(B)
        given_it, without = model.denoise(x, t, context), model.denoise(x, t, null)
        guided = classifier_free(model.denoise, context, null, scale)(x, t)
        expected = (1 - scale) * without.eps + scale * given_it.eps
        assert torch.allclose(guided.eps, expected, atol=1e-4 * max(1.0, float(expected.abs().max())))


def test_standardised_embeddings_come_back(prior):
    prior.mean.copy_(torch.arange(32.0))
    prior.std.copy_(torch.arange(32.0) + 0.5)
    z = torch.randn(4, 32)
    assert torch.allclose(prior.destandardise(prior.standardise(z)), z, atol=1e-5)


def test_a_dropped_condition_leaves_no_trace(decoder):
    x = torch.randn(B, 3, 16, 16)
    everything = torch.ones(B, dtype=torch.bool)
    z = torch.randn(B, 32)
    dropped = decoder.context(z, *text(), drop_image=everything, drop_text=everything)
    assert torch.allclose(decoder(x, T, dropped), decoder(x, T, decoder.null_context(B)), atol=1e-6)


def test_drops_are_per_sample(decoder):
    z, x = torch.randn(B, 32), torch.randn(B, 3, 16, 16)
    some = torch.tensor([True, False, False])
    mixed = decoder(x, T, decoder.context(z, *text(), drop_image=some, drop_text=some.flip(0)))
    kept = decoder(x, T, decoder.context(z, *text()))
    assert torch.allclose(mixed[1], kept[1], atol=1e-6)
    assert not torch.allclose(mixed[0], kept[0], atol=1e-3)
    assert not torch.allclose(mixed[2], kept[2], atol=1e-3)


def test_guidance_of_one_is_the_condition_alone(decoder):
    calls = []

    def network(x, t, context):
        calls.append(len(x))
        return decoder.denoise(x, t, context)

    context, null = decoder.context(torch.randn(B, 32), *text()), decoder.null_context(B)
    x = torch.randn(B, 3, 16, 16)
    alone = classifier_free(network, context, null, 1.0)(x, T)
    assert torch.equal(alone.eps, decoder.denoise(x, T, context).eps)
    assert calls == [B]


def test_guidance_moves_from_unconditional_through_conditional(decoder):
    context, null = decoder.context(torch.randn(B, 32), *text()), decoder.null_context(B)
    x, t = torch.randn(B, 3, 16, 16), torch.full((B,), 300)
    with_it, without = decoder.denoise(x, t, context), decoder.denoise(x, t, null)
    for scale in (0.0, 2.5):
        guided = classifier_free(decoder.denoise, context, null, scale)(x, t)
        assert torch.allclose(guided.eps, (1 - scale) * without.eps + scale * with_it.eps, atol=1e-4)
        assert torch.allclose(guided.x0, decoder.schedule.predict("eps", guided.eps, x, t).x0, atol=1e-3)


def test_a_clipped_prediction_is_in_range_and_consistent(decoder):
    context = decoder.context(torch.randn(B, 32), *text())
    x, t = 3 * torch.randn(B, 3, 16, 16), torch.full((B,), 300)
    prediction = clip_x0(lambda x, t: decoder.denoise(x, t, context), decoder.schedule)(x, t)
    assert prediction.x0.abs().max() <= 1
    assert torch.allclose(decoder.schedule.q_sample(prediction.x0, prediction.eps, t), x, atol=1e-4)


def test_an_upsampler_sees_its_condition_and_runs_on_crops():
    upsampler = shaken(Upsampler(replace(TINY.upsamplers[0], unshuffle=2)))
    x, low = torch.randn(B, 3, 16, 16), torch.randn(B, 3, 8, 8)
    assert upsampler(x, T, low).shape == x.shape
    assert not torch.allclose(upsampler(x, T, low), upsampler(x, T, low + 1), atol=1e-3)


def test_blur_is_each_samples_own_and_keeps_the_mean_level():
    images = torch.randn(3, 3, 12, 12)
    sigmas = torch.tensor([0.2, 0.4, 0.6])
    together = gaussian_blur(images, sigmas)
    assert torch.allclose(together[1:2], gaussian_blur(images[1:2], sigmas[1:2]), atol=1e-6)
    assert torch.allclose(gaussian_blur(images, torch.zeros(3)), images, atol=1e-6)
    assert torch.allclose(gaussian_blur(torch.ones(1, 3, 8, 8), torch.tensor([0.6])), torch.ones(1, 3, 8, 8))
    assert together.var() < images.var()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_built(name):
    with torch.device("meta"):
        for upsampler in PRESETS[name].upsamplers:
            Upsampler(upsampler)
        if PRESETS[name].prior is not None:
            DiffusionPrior(PRESETS[name].prior)
        Decoder(PRESETS[name].decoder)


@pytest.mark.parametrize(
    "change", [{"size": 18}, {"attention": (7,)}, {"groups": 5}, {"prediction": "z"}, {"first_stage": "wavelet"}]
)
def test_impossible_decoders_are_refused(change):
    with pytest.raises(Refused):
        replace(TINY.decoder, **change)
