"""The autoregressive prior: buckets, order, cache, guidance, and that it learns a distribution."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.fixtures.release import shaken
from training.optim.optimizer import Optimiser
from training.options import TrainConfig
from training.parallel.flat import Flat
from unclip.diffusion.guidance import join
from unclip.diffusion.samplers import noise_for
from unclip.models.ar_prior import AutoregressivePrior, AutoregressivePriorConfig, CachedDecoding, gumbel, sample_tokens
from unclip.models.prior import PriorContext
from unclip.presets import TINY

assert TINY.ar_prior is not None
CONFIG = TINY.ar_prior
CONFIGS = {
    "plain": CONFIG,
    "encoder": replace(CONFIG, context_width=16, text_depth=1, text_heads=2, depth=2, buckets=7),
}
B, L, K = 3, CONFIG.context, CONFIG.kept


def captions(seed: int = 0, batch: int = B) -> PriorContext:
    """Random captions of 4, 9 and all tokens."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(L)[None] < torch.tensor([4, 9, L]).repeat(batch)[:batch, None]
    return PriorContext(
        torch.randn(batch, 32, generator=generator), torch.randn(batch, L, 32, generator=generator), mask
    )


def sentences(config: AutoregressivePriorConfig, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.buckets, (B, config.tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=CONFIGS)
def prior(request) -> AutoregressivePrior:
    torch.manual_seed(0)
    made = shaken(AutoregressivePrior(CONFIGS[request.param]), 0).eval()
    assert isinstance(made, AutoregressivePrior)
    made.requires_grad_(False).out.weight.mul_(8)  # so that captions matter beside the noise
    made.embed_text.weight.mul_(3)
    made.null_text.set(torch.ones(32), torch.ones(L, 32), torch.arange(L) < 2)
    return made


# Tokens


def test_tokens_say_an_embedding_within_half_a_bucket_of_each_coordinate(prior):
    prior.pca.set(torch.full((32,), 3.0), torch.linalg.qr(torch.randn(32, 32))[0].T, torch.linspace(4, 1, 32))
    z, text = 3 + torch.randn(64, 32), torch.randn(64, 32)
    tokens = prior.tokenise(z, text)
    assert tokens.shape == (64, 1 + K)
    inside = prior.pca.project(z).clamp(-prior.config.reach, prior.config.reach)
    error = (prior.pca.project(prior.embedding(tokens)) - inside).abs()
    assert float(error.max()) <= prior.config.reach / prior.config.buckets + 1e-4


def test_the_buckets_of_the_dot_product_are_equally_frequent(prior):
    z, text = torch.randn(7 * 16 * 40, 32), torch.randn(7 * 16 * 40, 32)
    dots = (z.double() * text.double()).sum(1)
    prior.set_dots(dots)
    tokens = prior.tokenise(z, text)[:, 0]
    counts = np.bincount(tokens.numpy(), minlength=prior.config.buckets)
    assert abs(counts - len(z) / prior.config.buckets).max() <= 2
    ranks = scipy.stats.rankdata(dots.numpy())
    expected = np.floor((ranks - 0.5) / len(z) * prior.config.buckets)
    assert (tokens.numpy() == expected).mean() > 0.999


# What may and what must not reach a logit


def test_a_later_token_never_changes_an_earlier_logit(prior):
    tokens, context = sentences(prior.config)[:, :-1], captions()
    before = prior(tokens, *context)
    assert before.shape == (B, 1 + K, prior.config.buckets)
    for place in range(K):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % prior.config.buckets
        after = prior(changed, *context)
        assert torch.allclose(after[:, : place + 1], before[:, : place + 1], atol=1e-6)
        assert not torch.allclose(after[:, place + 1], before[:, place + 1], atol=1e-3)


def test_every_part_of_the_caption_reaches_the_first_logit(prior):
    context, tokens = captions(), sentences(prior.config)[:, :0]
    before = prior(tokens, *context)
    for part in ("text_embedding", "text_states"):
        after = prior(tokens, *context._replace(**{part: getattr(context, part) + 1}))
        assert not torch.allclose(after, before, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(-30, 30))
def test_what_padding_holds_never_changes_a_logit(seed, value):
    for config in CONFIGS.values():
        prior = shaken(AutoregressivePrior(config), 0).eval()
        context, tokens = captions(seed), sentences(config, seed)[:, :-1]
        other = torch.where(context.text_mask[..., None], context.text_states, torch.tensor(value))
        changed = context._replace(text_states=other)
        assert torch.allclose(prior(tokens, *context), prior(tokens, *changed), atol=1e-5)


def test_a_dropped_caption_leaves_no_trace_and_drops_are_per_row(prior):
    tokens, text = sentences(prior.config)[:, :-1], captions()
    some = torch.tensor([True, False, True])
    logits = prior(tokens, *prior.context(*text, some))
    assert torch.allclose(logits[some], prior(tokens, *prior.null_context(B))[some], atol=1e-5)
    assert torch.allclose(logits[1], prior(tokens, *text)[1], atol=1e-5)
    assert not torch.allclose(logits[0], prior(tokens, *text)[0], atol=1e-2)


def test_its_logits_are_those_of_gpt2_with_the_same_weights():
    from transformers import GPT2Config, GPT2Model

    config = replace(CONFIG, depth=3)
    prior = shaken(AutoregressivePrior(config), 0).eval()
    assert isinstance(prior, AutoregressivePrior)
    context, tokens = captions(), sentences(config)[:, :-1]
    shape = GPT2Config(
        vocab_size=2, n_positions=len(prior.positions), n_embd=config.width, n_layer=config.depth, n_head=config.heads,
        activation_function="gelu", attn_implementation="eager",
    )  # fmt: skip
    gpt2 = GPT2Model(shape).eval()
    names = {"ln_1": "norm_1", "attn.c_attn": "qkv", "attn.c_proj": "out", "ln_2": "norm_2", "mlp.c_fc": "up"}
    names["mlp.c_proj"] = "down"
    with torch.no_grad():
        gpt2.wpe.weight.copy_(prior.positions)
        for number, block in enumerate(gpt2.h):
            for theirs, ours in names.items():
                module, source = block.get_submodule(theirs), prior.blocks[number].get_submodule(ours)
                module.weight.copy_(source.weight.T if theirs.count(".") else source.weight)
                module.bias.copy_(source.bias)
        gpt2.ln_f.load_state_dict(prior.norm.state_dict())
        states = prior.embed_states(prior.text(context.text_states, context.text_mask))
        words = [states, prior.embed_text(context.text_embedding)[:, None], prior.token_embedding(tokens)]
        seen = nn.functional.pad(context.text_mask, (0, 1 + K), value=True)
        places = torch.arange(seen.shape[1]).expand(B, -1)
        hidden = gpt2(inputs_embeds=torch.cat(words, 1), attention_mask=seen, position_ids=places).last_hidden_state
        expected = prior.out(hidden[:, L:])
    assert torch.allclose(prior(tokens, *context), expected, atol=1e-4)


# Sampling


def recomputed(prior, context, null, noise, guidance, temperature) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Sampling that reads everything again for each token, conditional and unconditional in two calls."""
    tokens, seen = torch.zeros(B, 0, dtype=torch.long), []
    for place in range(prior.config.tokens):
        given, without = (prior(tokens, *text)[:, -1] for text in (context, null))
        logits = without + guidance * (given - without)
        seen.append(logits)
        first = prior.config.buckets // 2 if place == 0 else 0
        uniform = torch.from_numpy(scipy.stats.norm.cdf(noise(place).double().numpy()))
        scores = logits.double() - temperature * (-uniform.log()).log()
        tokens = torch.cat([tokens, first + scores[:, first:].argmax(1, keepdim=True)], 1)
    return tokens, seen


@pytest.mark.parametrize(("guidance", "temperature"), [(1.0, 1.0), (2.5, 1.0), (0.0, 1.0), (1.5, 0.3), (2.0, 0.0)])
def test_sampling_with_a_cache_is_sampling_without_one(prior, guidance, temperature):
    context, null, noise = captions(), prior.null_context(B), noise_for([3, 1, 4], (prior.config.buckets,))
    got = sample_tokens(prior, context, null, noise, guidance=guidance, temperature=temperature)
    expected, _ = recomputed(prior, context, null, noise, guidance, temperature)
    assert torch.equal(got, expected)


@torch.no_grad()
def test_the_caches_logits_are_the_recomputed_ones_and_one_batched_call_is_two(prior):
    tokens, context, null = sentences(prior.config), captions(), prior.null_context(B)
    readings = [CachedDecoding(prior, join(context, null)), CachedDecoding(prior, context), CachedDecoding(prior, null)]
    whole = [prior(tokens[:, :-1], *text) for text in (context, null)]
    for place in range(prior.config.tokens):
        both, given, without = (reading.logits for reading in readings)
        assert torch.allclose(both, torch.cat([given, without]), atol=1e-5)
        assert torch.allclose(given, whole[0][:, place], atol=1e-5)
        assert torch.allclose(without, whole[1][:, place], atol=1e-5)
        if place < K:
            readings[0].read(tokens[:, place].repeat(2))
            for reading in readings[1:]:
                reading.read(tokens[:, place])


def test_guidance_of_one_is_the_caption_alone_and_of_zero_the_empty_one(prior):
    context, null, noise = captions(), prior.null_context(B), noise_for([0, 1, 2], (prior.config.buckets,))
    nothing = PriorContext(*(torch.full_like(part, math.nan, dtype=torch.float32) for part in null))
    alone = sample_tokens(prior, context, nothing, noise)
    assert torch.equal(alone, recomputed(prior, context, null, noise, 1.0, 1.0)[0])
    unguided = sample_tokens(prior, null, null, noise)
    assert torch.equal(sample_tokens(prior, context, null, noise, guidance=0.0), unguided)
    assert not torch.equal(alone, unguided)


def test_a_rows_sample_does_not_depend_on_its_neighbours(prior):
    context, null, seeds = captions(), prior.null_context(B), [5, 6, 7]

    def draw(rows: list[int]) -> torch.Tensor:
        text = PriorContext(*(part[rows] for part in context))
        noise = noise_for([seeds[row] for row in rows], (prior.config.buckets,))
        return sample_tokens(prior, text, prior.null_context(len(rows)), noise, guidance=1.7)

    together = draw([0, 1, 2])
    assert torch.equal(draw([2, 0, 1]), together[[2, 0, 1]])
    assert torch.equal(torch.cat([draw([row]) for row in range(3)]), together)
    noise = noise_for([8, 9, 10], (prior.config.buckets,))
    assert not torch.equal(sample_tokens(prior, context, null, noise, guidance=1.7), together)


def test_the_dot_product_is_drawn_from_the_top_half_of_its_buckets(prior):
    context = PriorContext(*(part[:1].expand(200, *part.shape[1:]) for part in captions()))
    noise = noise_for(range(200), (prior.config.buckets,))
    tokens = sample_tokens(prior, context, prior.null_context(200), noise)
    assert int(tokens[:, 0].min()) >= prior.config.buckets // 2
    assert len(set(tokens[:, 0].tolist())) > 1
    assert int(tokens[:, 1:].min()) < prior.config.buckets // 2


def test_the_noise_is_gumbels_in_both_tails():
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    assert scipy.stats.kstest(gumbel(normal).numpy(), scipy.stats.gumbel_r.cdf).pvalue > 0.01
    ends = torch.tensor([-8.0, -5.0, 5.0, 8.0])
    exact = -np.log(-scipy.stats.norm.logcdf(ends.double().numpy()))
    np.testing.assert_allclose(gumbel(ends).numpy(), exact, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_token_is_drawn_with_the_softmaxs_probabilities_at_its_temperature(prior, temperature):
    count, half = 4000, prior.config.buckets // 2
    context = PriorContext(*(part[:1].expand(count, *part.shape[1:]) for part in captions()))
    with torch.no_grad():
        spread = float(CachedDecoding(prior, context).logits[0].std())
        prior.out.weight /= spread  # too far apart, and no bucket but one would ever come
        prior.out.bias /= spread
        logits = CachedDecoding(prior, context).logits[0, half:]
    drawn: list[torch.Tensor] = []
    noise = noise_for(range(count), (prior.config.buckets,))
    sample_tokens(
        prior, context, context, noise, temperature=temperature, callback=lambda _, tokens: drawn.append(tokens)
    )
    counts = np.bincount(drawn[0][:, 0].numpy() - half, minlength=len(logits))
    expected = count * torch.softmax(logits.double() / temperature, 0).numpy()
    assert scipy.stats.chisquare(counts, expected * count / expected.sum()).pvalue > 0.001


# Learning


MODES = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, -1.0, 0.0, 0.0], [-1.0, 0.0, 1.0, 0.0], [-1.0, 0.0, -1.0, 0.0]])
"""Of z_i: the first two under one caption, the last two under the other."""
SPREAD = 0.15
TOY = AutoregressivePriorConfig(4, 4, 1, width=32, depth=2, heads=2, components=4, buckets=64, reach=3.0)


def toy(count: int, seed: int) -> tuple[torch.Tensor, PriorContext, torch.Tensor]:
    """(z_i [n, 4], captions, which of the two): a mixture of two modes given the caption's embedding."""
    generator = torch.Generator().manual_seed(seed)
    caption = torch.randint(2, (count,), generator=generator)
    mode = 2 * caption + torch.randint(2, (count,), generator=generator)
    z = MODES[mode] + SPREAD * torch.randn(count, 4, generator=generator)
    text = nn.functional.one_hot(torch.zeros_like(caption), 4) * (1.0 - 2.0 * caption[:, None])
    return z, PriorContext(text, torch.zeros(count, 1, 4), torch.ones(count, 1, dtype=torch.bool)), caption


def trained(prior: AutoregressivePrior, steps: int) -> AutoregressivePrior:
    """The prior after so many steps of 128 rows of the toy, 10 % of them without a caption."""
    z, text, _ = toy(4000, 0)
    values, columns = torch.linalg.eigh(torch.cov(z.T, correction=0))
    prior.pca.set(z.mean(0), columns.T.flip(0), values.flip(0))
    prior.set_dots((z * text.text_embedding).sum(1))
    tokens, flat = prior.tokenise(z, text.text_embedding), Flat(prior)
    optimiser, generator = Optimiser(flat, TrainConfig(steps=steps)), torch.Generator().manual_seed(1)
    for step in range(steps):
        at = torch.randint(len(z), (128,), generator=generator)
        context = prior.context(*(part[at] for part in text), torch.rand(128, generator=generator) < 0.1)
        flat.gradient.zero_()
        nn.functional.cross_entropy(prior(tokens[at][:, :-1], *context).mT, tokens[at]).backward()
        optimiser.step(5e-3 * (1 - step / steps))
    return prior.eval()


@pytest.mark.slow
def test_it_learns_a_mixture_that_depends_on_the_caption():
    torch.manual_seed(0)
    prior = trained(AutoregressivePrior(TOY), steps=400)
    # On rows that it never saw: nats of all tokens, against the entropy of the coordinates' buckets, which no model can
    # go below; the dot product's token, whose bucket the coordinates leave open, takes at most ln 64 = 4.2 more.
    z, text, caption = toy(2000, 2)
    tokens = prior.tokenise(z, text.text_embedding)
    with torch.no_grad():
        logits = prior(tokens[:, :-1], *text)
    nats = float(nn.functional.cross_entropy(logits.mT, tokens, reduction="none").sum(1).mean())
    widths = 2 * TOY.reach * prior.pca.deviation / TOY.buckets
    entropy = math.log(2) + 4 * 0.5 * math.log(2 * math.pi * math.e * SPREAD**2) - float(widths.log().sum())
    assert entropy < nats < entropy + math.log(TOY.buckets)

    def drawn(guidance: float) -> torch.Tensor:
        some, null = PriorContext(*(part[:400] for part in text)), prior.null_context(400)
        noise = noise_for(range(400), (TOY.buckets,), stream="toy")
        return prior.embedding(sample_tokens(prior, some, null, noise, guidance=guidance))

    def shares(found: torch.Tensor) -> torch.Tensor:
        """How often each mode is the nearest, [2 captions, 4]."""
        nearest = torch.cdist(found, MODES).argmin(1)
        return torch.stack([torch.bincount(nearest[caption[:400] == c], minlength=4).float() for c in (0, 1)]) / 200

    own = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
    for guidance in (1.0, 2.0):
        found = drawn(guidance)
        assert float((shares(found) - own).abs().max()) < 0.1
        assert float(torch.cdist(found, MODES).amin(1).mean()) < 1.2 * SPREAD * 1.88  # the mean of χ with 4 degrees
    assert float((shares(drawn(0.0)) - 0.25).abs().max()) < 0.1  # without a caption every mode alike
    # The dot product is 1 with a deviation of SPREAD; its upper half has this mean.
    likes = (drawn(1.0) * text.text_embedding[:400]).sum(1).mean()
    assert float(likes) == pytest.approx(1 + SPREAD * math.sqrt(2 / math.pi), abs=0.03)
