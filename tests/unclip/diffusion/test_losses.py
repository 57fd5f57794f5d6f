import math

import numpy as np
import pytest
import torch
from scipy.special import ndtr

from tests.fixtures.gaussian import Gaussian
from unclip.diffusion.analytic import optimal_variance
from unclip.diffusion.losses import WEIGHTINGS, bits_per_dim, hybrid_loss, loss_weights, simple_loss
from unclip.diffusion.schedule import PREDICTIONS, Schedule
from unclip.errors import Refused

SCHEDULE = Schedule.named("cosine")
T = torch.tensor([5, 200, 500, 800])


def draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise, guess = torch.randn(3, 4, 3, 4, 4, generator=generator, dtype=torch.float64)
    return x0, noise, guess


def output_for(kind: str, guess: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The output by which a network of this kind would say that the clean sample is `guess`."""
    x = SCHEDULE.q_sample(x0, noise, T)
    eps = (x - SCHEDULE.at("alpha", T, x) * guess) / SCHEDULE.at("sigma", T, x)
    return SCHEDULE.target(kind, guess, eps, T)


@pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if w != "uniform"])
def test_a_weighting_means_the_same_for_every_kind_of_prediction(weighting):
    x0, noise, guess = draw()
    losses = [
        simple_loss(
            SCHEDULE, output_for(kind, guess, x0, noise), x0, noise, T, kind, loss_weights(SCHEDULE, T, kind, weighting)
        )
        for kind in PREDICTIONS
    ]
    for loss in losses[1:]:
        assert torch.allclose(loss, losses[0], rtol=1e-4)


def test_min_snr_plus_one_never_vanishes_and_is_capped():
    x0_weights = loss_weights(SCHEDULE, torch.tensor([0, 999]), "x0", "min_snr_plus_one", cap=6.0)
    assert x0_weights.tolist() == pytest.approx([6.0, 1.0], abs=1e-6)


def test_the_bound_of_a_perfect_network_with_the_true_variance_is_zero():
    x0, noise, _ = draw()
    fraction = torch.full_like(x0, -1.0)
    output = torch.cat([SCHEDULE.target("eps", x0, noise, T), fraction], 1)
    loss = hybrid_loss(SCHEDULE, output, x0, noise, T, "eps", torch.ones(4))
    assert torch.allclose(loss, torch.zeros_like(loss), atol=1e-4)


def test_the_bound_trains_the_variances_alone():
    x0, noise, guess = draw()
    output = torch.cat([guess, torch.zeros_like(guess)], 1).requires_grad_()
    hybrid_loss(SCHEDULE, output, x0, noise, T, "eps", torch.zeros(4)).sum().backward()
    assert output.grad is not None
    mean, fraction = output.grad.chunk(2, dim=1)
    assert not mean.any()
    assert fraction.any()


def paper_step(betas, step, x0, x, mean_x0, fraction):
    """L_t of Ho et al. 2020 (equations 5, 7, 13) in bits per dimension, float64 numpy from the betas alone.

    `fraction` places log σ² between β̃ and β (Nichol & Dhariwal 2021, equation 15); β̃_1 stands for β̃_0.
    """
    alphas = 1 - betas
    bar = np.cumprod(alphas)
    before = np.append(1.0, bar[:-1])
    tilde = betas * (1 - before) / (1 - bar)
    tilde[0] = tilde[1]
    variance = np.exp((fraction + 1) / 2 * np.log(betas[step]) + (1 - fraction) / 2 * np.log(tilde[step]))

    def mean(x0):
        return (np.sqrt(before[step]) * betas[step] * x0 + np.sqrt(alphas[step]) * (1 - before[step]) * x) / (
            1 - bar[step]
        )

    if step == 0:
        upper = np.where(x0 > 0.999, 1.0, ndtr((x0 + 1 / 255 - mean(mean_x0)) / np.sqrt(variance)))
        lower = np.where(x0 < -0.999, 0.0, ndtr((x0 - 1 / 255 - mean(mean_x0)) / np.sqrt(variance)))
        nats = -np.log(np.maximum(upper - lower, 1e-12))
    else:
        nats = 0.5 * (
            np.log(variance / tilde[step]) + tilde[step] / variance - 1 + (mean(x0) - mean(mean_x0)) ** 2 / variance
        )
    return nats.mean(axis=tuple(range(1, x0.ndim))) / np.log(2)


def levels(x: torch.Tensor) -> torch.Tensor:
    """To the nearest of the 256 levels in [-1, 1]."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


@pytest.mark.parametrize("steps", [1000, 250])
def test_the_hybrid_loss_is_guided_diffusions(steps):
    """Mean squared error + T/1000 of one step of the bound, which is λ = 0.001 of T times that step."""
    schedule = Schedule.named("cosine", steps)
    x0, noise, guess = draw()
    x0, t = levels(0.4 * x0), torch.tensor([0, 1, steps // 2, steps - 10])
    x = schedule.q_sample(x0, noise, t)
    eps, fraction = 0.9 * noise + 0.1 * guess, torch.sin(guess)
    mean_x0 = schedule.predict("eps", eps, x, t).x0
    expected = [
        float(((eps[i] - noise[i]) ** 2).mean())
        + steps
        / 1000
        * paper_step(
            schedule.betas.numpy().copy(), int(t[i]), *(part[i : i + 1].numpy() for part in (x0, x, mean_x0, fraction))
        )[0]
        for i in range(4)
    ]
    found = hybrid_loss(schedule, torch.cat([eps, fraction], 1), x0, noise, t, "eps", torch.ones(4))
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    unweighted = hybrid_loss(
        schedule, torch.cat([eps, fraction], 1), x0, noise, t, "eps", torch.ones(4), vlb_weight=0.0
    )
    assert torch.allclose(unweighted, (eps - noise).square().flatten(1).mean(1))


def test_the_whole_bound_is_the_papers_equations_step_by_step():
    schedule = Schedule.named("linear", 12)
    x0 = levels(0.6 * draw()[0])
    noise = torch.randn(12, *x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def denoise(x, t):
        output = torch.cat([torch.tanh(x.flip(-1)), torch.sin(x)], 1)
        return schedule.predict("x0", output, x, t, learned_range=True)

    bound = bits_per_dim(denoise, schedule, x0, lambda k: noise[k])
    bar = np.cumprod(1 - schedule.betas.numpy())
    for step in range(12):
        x = np.sqrt(bar[step]) * x0.numpy() + np.sqrt(1 - bar[step]) * noise[step].numpy()
        mean_x0 = np.tanh(x[..., ::-1])
        expected = paper_step(schedule.betas.numpy().copy(), step, x0.numpy(), x, mean_x0, np.sin(x))
        assert bound.terms[:, step].tolist() == pytest.approx(expected.tolist(), rel=1e-6), step
    mean, variance = np.sqrt(bar[-1]) * x0.numpy(), 1 - bar[-1]
    prior = 0.5 * (mean**2 + variance - 1 - np.log(variance)).mean((1, 2, 3)) / np.log(2)
    assert bound.prior.tolist() == pytest.approx(prior.tolist(), rel=1e-6)
    assert torch.allclose(bound.total, bound.prior + bound.terms.sum(1))


PIXELS = Gaussian(torch.zeros(4, dtype=torch.float64), 0.04 * torch.eye(4, dtype=torch.float64))
GAMMA = (1 - SCHEDULE.alphas_cumprod) / (SCHEDULE.alphas_cumprod * 0.04 + 1 - SCHEDULE.alphas_cumprod)


def bound_of(steps: int, variance):
    few = SCHEDULE.respace(steps)
    generator = torch.Generator().manual_seed(1)
    x0 = levels(PIXELS.draw(2500))
    table = optimal_variance(few, GAMMA) if variance == "optimal" else variance
    noise = lambda k: torch.randn(x0.shape, generator=generator, dtype=torch.float64)  # noqa: E731
    bound = bits_per_dim(PIXELS.denoiser(SCHEDULE), few, x0, noise, table)
    # The code length under the data's own density, for the very same samples: a level is 2/255 wide.
    truth = (x0.square() / 0.04 + math.log(2 * math.pi * 0.04)).mean() / (2 * math.log(2)) - math.log2(2 / 255)
    return bound, float(bound.total.mean() - truth)


def test_with_the_best_denoiser_and_variances_the_bound_is_the_entropy_of_the_data():
    """Of 8-bit Gaussian pixels, 6.72 bits each. 10,000 of them, 250 steps; the excess is 0.01 bits or less."""
    bound, excess = bound_of(250, "optimal")
    assert bound.total.mean().item() == pytest.approx(6.72, abs=0.05)
    assert abs(excess) < 0.02


def test_no_other_variance_has_a_lower_bound_than_the_optimal():
    excess = {variance: bound_of(25, variance)[1] for variance in ("optimal", "fixed_small", "fixed_large")}
    assert excess["optimal"] < 0.1
    assert excess["fixed_small"] > excess["optimal"] + 0.1
    assert excess["fixed_large"] > excess["optimal"] + 0.1


def test_each_term_of_the_bound_has_its_closed_form():
    """E L_t = ½(log σ²/β̃ + β̃/σ² − 1 + c²·Var[x0 | x_t]/σ²) with c the weight of x0 in the posterior's mean."""
    bound, _ = bound_of(25, "fixed_large")
    few = SCHEDULE.respace(25)
    bar, before, beta, tilde = few.alphas_cumprod, few.alphas_cumprod_prev, few.betas, few.posterior_variance
    left = 0.04 * (1 - bar) / (0.04 * bar + 1 - bar)
    weight = before.sqrt() * beta / (1 - bar)
    nats = 0.5 * ((beta / tilde).log() + tilde / beta - 1 + weight.square() * left / beta)
    # 10,000 squared normal numbers a term: their mean deviates by 1.4 %.
    assert bound.terms.mean(0)[1:].tolist() == pytest.approx((nats / math.log(2))[1:].tolist(), rel=0.06)


def test_a_negative_weight_of_the_bound_is_refused():
    x0, noise, guess = draw()
    with pytest.raises(Refused, match="at least 0, not -1"):
        hybrid_loss(SCHEDULE, torch.cat([guess, guess], 1), x0, noise, T, "eps", torch.ones(4), vlb_weight=-1.0)


def test_an_unknown_weighting_is_refused():
    with pytest.raises(Refused):
        loss_weights(SCHEDULE, T, "x0", "soft")
