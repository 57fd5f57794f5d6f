"""What guidance promises for every network: the convention of ω, one call for two, intervals, rescaling."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unclip.diffusion.guidance import classifier_free, conditional, threshold_dynamically
from unclip.diffusion.schedule import PREDICTIONS, Prediction, Schedule
from unclip.errors import Refused

SCHEDULE = Schedule.named("cosine")


class Context(NamedTuple):
    """As the models' contexts are: a tuple, nested, of tensors with the batch first."""

    shift: torch.Tensor
    more: tuple[torch.Tensor, ...]


class Network:
    """A small network of any kind that counts its calls and the rows of each."""

    def __init__(self, kind: str = "eps", learned: bool = True) -> None:
        self.kind, self.learned, self.rows = kind, learned, []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, context: Context) -> Prediction:
        self.rows.append(len(x))
        wide = (-1, 1, 1, 1)
        output = torch.tanh(x * context.more[0].view(wide) + context.shift.view(wide) + t.view(wide) / 1000)
        both = torch.cat([output, torch.sin(output)], 1) if self.learned else output
        return SCHEDULE.predict(self.kind, both, x, t, learned_range=self.learned)


def draw(seed: int, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, Context, Context]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.randint(1000, (rows,), generator=generator)
    parts = torch.randn(4, rows, generator=generator, dtype=torch.float64)
    return x, t, Context(parts[0], (parts[1],)), Context(parts[2], (parts[3],))


def assert_equal(ours: Prediction, expected: Prediction, **tolerance: float) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert (a is None) == (b is None)
        # x0 of an ε network grows with 1/α, up to 20,000: relative to its own size.
        assert a is None or torch.allclose(a, b, **{"rtol": 1e-9, "atol": 1e-9} | tolerance)


kinds, seeds = st.sampled_from(PREDICTIONS), st.integers(0, 2**32)
scales = st.floats(0, 20)


@settings(max_examples=40, deadline=None)
@given(kinds, seeds, scales, st.booleans())
def test_one_batched_call_is_the_formula_over_two(kind, seed, scale, learned):
    """ε̂ = (1 − ω)·ε(∅) + ω·ε(y), from two calls; and the clean sample is the one that belongs to ε̂ at x_t."""
    network = Network(kind, learned)
    x, t, context, null = draw(seed)
    guided = classifier_free(network, context, null, scale)(x, t)
    assert len(network.rows) == 1
    with_y, without = network(x, t, context), network(x, t, null)
    eps = (1 - scale) * without.eps + scale * with_y.eps
    alpha, sigma = SCHEDULE.at("alpha", t, x), SCHEDULE.at("sigma", t, x)
    assert torch.allclose(guided.eps, eps, atol=1e-9)
    assert torch.allclose(alpha * guided.x0 + sigma * guided.eps, x, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(kinds, seeds, st.floats(0, 1))
def test_one_is_the_conditional_and_zero_the_unconditional(kind, seed, rescale):
    network = Network(kind)
    x, t, context, null = draw(seed)
    for scale, alone in ((1, context), (1.0, context), (0, null), (0.0, null)):
        network.rows.clear()
        guided = classifier_free(network, context, null, scale, rescale=rescale, schedule=SCHEDULE)(x, t)
        assert network.rows == [len(x)]
        assert_equal(guided, conditional(network, alone)(x, t), rtol=0, atol=0)


@settings(max_examples=40, deadline=None)
@given(seeds, scales, st.integers(0, 999), st.integers(0, 999))
def test_outside_its_interval_guidance_is_off_and_inside_on(seed, scale, a, b):
    first, last = sorted((a, b))
    network = Network()
    x, t, context, null = draw(seed, rows=6)
    t[:2] = torch.tensor([first, last])
    guided = classifier_free(network, context, null, scale, interval=(first, last))(x, t)
    off, on = conditional(network, context)(x, t), classifier_free(network, context, null, scale)(x, t)
    inside = ((t >= first) & (t <= last)).tolist()
    assert inside[:2] == [True, True]
    for row, within in enumerate(inside):
        expected = on if within else off
        assert_equal(Prediction(*(p[row] for p in guided)), Prediction(*(p[row] for p in expected)))


def test_outside_its_interval_the_network_is_called_once_a_row():
    network = Network()
    x, _, context, null = draw(0)
    guided = classifier_free(network, context, null, 3.0, interval=(200, 700))
    for step in (900, 701, 700, 200, 199):
        guided(x, torch.full((3,), step))
    assert network.rows == [3, 3, 6, 6, 3]


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(1.5, 20))
def test_fully_rescaled_the_clean_sample_has_the_unguided_contrast(seed, scale):
    network = Network("x0")
    x, t, context, null = draw(seed)
    guided = classifier_free(network, context, null, scale, rescale=1.0, schedule=SCHEDULE)(x, t)
    found, unguided = guided.x0.flatten(1).std(1), network(x, t, context).x0.flatten(1).std(1)
    assert torch.allclose(found, unguided, atol=1e-9)


@pytest.mark.slow  # importing their pipeline is what takes the time
@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(1.5, 20), st.floats(0, 1))
def test_rescaling_is_that_of_diffusers_on_the_clean_sample(seed, scale, rescale):
    pipelines = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    network = Network("x0")
    x, t, context, null = draw(seed)
    guided = classifier_free(network, context, null, scale, rescale=rescale, schedule=SCHEDULE)(x, t)
    with_y, without = network(x, t, context).x0, network(x, t, null).x0
    plain = without + scale * (with_y - without)
    assert torch.allclose(guided.x0, pipelines.rescale_noise_cfg(plain, with_y, rescale), atol=1e-9)
    assert torch.allclose(SCHEDULE.q_sample(guided.x0, guided.eps, t), x, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(0.5, 1), st.floats(0.1, 4))
def test_a_dynamic_threshold_leaves_pictures_in_range_and_those_in_range_alone(seed, percentile, size):
    """And a picture's threshold is its own: its neighbours do not matter."""
    x, t, *_ = draw(seed)
    clean = size * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    clean[0] = clean[0].clamp(-1, 1)

    def denoise(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        return Prediction(clean[: len(x)], x)

    found = threshold_dynamically(denoise, SCHEDULE, percentile)(x, t)
    assert found.x0.abs().max() <= 1
    assert torch.equal(found.x0[0], clean[0])
    assert torch.allclose(SCHEDULE.q_sample(found.x0, found.eps, t), x, atol=1e-9)
    assert torch.equal(threshold_dynamically(denoise, SCHEDULE, percentile)(x[:2], t[:2]).x0, found.x0[:2])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scale": math.nan}, "finite number.*not nan"),
        ({"scale": math.inf}, "finite number.*not inf"),
        ({"interval": (700, 200)}, r"not \(700, 200\)"),
        ({"interval": (-1, 200)}, r"from 0 up, not \(-1, 200\)"),
        ({"rescale": 1.5}, "rescale must lie between 0 and 1, not 1.5"),
        ({"rescale": math.nan}, "rescale must lie between 0 and 1, not nan"),
        ({"rescale": 0.5}, "needs the schedule"),
    ],
)
def test_guidance_out_of_range_is_refused_with_value_and_range(options, named):
    *_, context, null = draw(0)
    with pytest.raises(Refused, match=named):
        classifier_free(Network(), context, null, **{"scale": 2.0} | options)


@pytest.mark.parametrize(("percentile", "most"), [(0.0, 2.0), (1.1, 2.0), (math.nan, 2.0), (0.9, 0.5)])
def test_a_threshold_out_of_range_is_refused_with_the_value(percentile, most):
    with pytest.raises(Refused, match=f"not ({percentile}|{most})"):
        threshold_dynamically(lambda x, t: Prediction(x, x), SCHEDULE, percentile, most)
