"""Samplers on Gaussian data, where the best denoiser and the true answers are known in closed form.

Here is nothing of ours but schedules and samplers: what is wrong with a mean, a variance or a step has nowhere to hide.
"""

import math

import pytest
import torch

from tests.fixtures.gaussian import CORRELATED, Gaussian
from unclip.diffusion.analytic import estimate_gamma, optimal_variance
from unclip.diffusion.guidance import classifier_guidance, clip_guidance, log_gradient
from unclip.diffusion.samplers import analytic_dpm, ddim, ddim_invert, ddpm, dpm_solver_pp
from unclip.diffusion.schedule import Prediction, Schedule
from unclip.errors import Refused

SCHEDULE = Schedule.named("cosine")
COUNT = 20_000
LIMIT = 4.5
ROUND = Gaussian(torch.full((3,), 0.2, dtype=torch.float64), 0.25 * torch.eye(3, dtype=torch.float64))


def normal(count: int, width: int = 3, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return lambda step: torch.randn(count, width, generator=generator, dtype=torch.float64)


def deviation(x: torch.Tensor, truth: Gaussian) -> float:
    """How far mean and covariance of samples [n, d] are from the truth: the largest of their standard scores.

    Whitened by the truth, the entries of mean and covariance are independent with deviations 1/√n and √(2/n) or 1/√n.
    """
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(truth.covariance), (x - truth.mean).T, upper=False).T
    n, eye = len(x), torch.eye(x.shape[1], dtype=torch.float64)
    of_mean = white.mean(0) * n**0.5
    of_covariance = (white.T @ white / n - eye) * n**0.5 / (1 + eye).sqrt()
    return max(of_mean.abs().max().item(), of_covariance.abs().max().item())


def gamma_of(data: Gaussian) -> torch.Tensor:
    """E‖ε̂‖²/d exactly: ε̂ is linear in x_t, with covariance σ²·(α²S + σ²)⁻¹."""
    values = torch.linalg.eigvalsh(data.covariance)
    bar = SCHEDULE.alphas_cumprod[:, None]
    return ((1 - bar) / (bar * values + 1 - bar)).mean(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "steps", "options"),
    [
        (ddpm, 1000, {"variance": "fixed_small"}),
        (ddpm, 1000, {"variance": "fixed_large"}),
        (ddim, 250, {}),
        (ddim, 1000, {"eta": 1.0}),
        (dpm_solver_pp, 100, {}),
        (analytic_dpm, 100, {"gamma": gamma_of(CORRELATED)}),
    ],
    ids=["ddpm-small", "ddpm-large", "ddim", "ddim-eta", "dpm-solver", "analytic"],
)
def test_every_sampler_has_the_datas_mean_and_covariance(sampler, steps, options):
    """20,000 samples; of the 9 standard scores none may exceed 4.5, which a right sampler does in 1 of 16,000 runs.

    Power: a mean that is off by 0.05 deviations, or a variance by 7 %, has an expected score of 7, and is found with
    probability 0.994.
    """
    noise = normal(COUNT)
    denoise = CORRELATED.denoiser(SCHEDULE)
    x = sampler(denoise, noise(0), SCHEDULE.respace(steps), noise=noise, **options)
    assert deviation(x, CORRELATED) < LIMIT


def test_analytic_variances_are_exact_where_ten_steps_of_ddpm_are_far_off():
    """With equal variance in every direction the reverse process is Gaussian, and one number a step is all it takes."""
    few, denoise = SCHEDULE.respace(10), ROUND.denoiser(SCHEDULE)
    found = {}
    for name, options in {
        "optimal": {"gamma": gamma_of(ROUND)},
        "small": {},
        "large": {"variance": "fixed_large"},
    }.items():
        noise = normal(COUNT)
        sampler = analytic_dpm if "gamma" in options else ddpm
        found[name] = deviation(sampler(denoise, noise(0), few, noise=noise, **options), ROUND)
    assert found["optimal"] < LIMIT
    assert min(found["small"], found["large"]) > 4 * LIMIT


def test_the_optimal_variance_is_that_of_the_true_reverse_process():
    """p(x_s | x_t) of Gaussian data, from the joint of (x_s, x_t) and not from the paper's theorem."""
    few = SCHEDULE.respace(20)
    here, below = few.alphas_cumprod[1:], few.alphas_cumprod[:-1]
    var = 0.25
    cross = (here * below).sqrt() * var + (here / below).sqrt() * (1 - below)
    expected = (below * var + 1 - below) - cross.square() / (here * var + 1 - here)
    assert torch.allclose(optimal_variance(few, gamma_of(ROUND))[1:], expected, rtol=1e-6)


def test_gamma_is_estimated_without_bias():
    """ε̂ is Gaussian with variances g along its axes, so ‖ε̂‖²/d has the mean Σg/d and the variance 2Σg²/d².

    1,000 samples: each of 20 timesteps within 4.5 standard errors, which a right estimator misses in 1 of 7,000 runs.
    The error is 2.6 % of γ where g is even, so a factor that is off by a tenth is 4 errors off, at every timestep.
    """
    schedule = Schedule(SCHEDULE.respace(20).betas)
    batches = [(CORRELATED.denoiser(schedule), CORRELATED.draw(500, seed)) for seed in (0, 1)]
    values = torch.linalg.eigvalsh(CORRELATED.covariance)
    bar = schedule.alphas_cumprod[:, None]
    g = (1 - bar) / (bar * values + 1 - bar)
    error = (2 * g.square().sum(1) / 3**2 / 1000).sqrt()
    found = estimate_gamma(batches, schedule)
    assert ((found - g.mean(1)) / error).abs().max() < 4.5
    assert (found / g.mean(1)).mean().item() == pytest.approx(1, abs=0.02)


def test_the_variances_keep_to_their_bounds():
    few = SCHEDULE.respace(20)
    low, high = few.posterior_variance, optimal_variance(few, torch.zeros(1000), data_variance=100.0)
    wild = optimal_variance(few, 3 * torch.rand(1000, generator=torch.Generator().manual_seed(0)), data_variance=100.0)
    assert (wild >= low).all()
    assert (wild <= high).all()
    clipped = optimal_variance(few, torch.zeros(1000), levels=2.0)
    # A Gaussian's mean absolute value is σ·√(2/π); in 8-bit levels it is at most 2.
    assert clipped[1].sqrt().item() * math.sqrt(2 / math.pi) * 255 / 2 == pytest.approx(2)
    assert torch.equal(clipped[2:], optimal_variance(few, torch.zeros(1000))[2:])


@pytest.mark.parametrize(("steps", "iterations"), [(50, 3), (250, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverted_and_sampled_a_picture_is_itself_again(dtype, steps, iterations):
    few, denoise, x0 = SCHEDULE.respace(steps), CORRELATED.denoiser(SCHEDULE), CORRELATED.draw(500).to(dtype)
    x = ddim_invert(denoise, x0, few, iterations=iterations)
    assert (ddim(denoise, x, few) - x0).abs().max() < 1e-3
    assert (x - x0).abs().max() > 1


def even_log_snr(steps: int) -> Schedule:
    """A process whose log SNR falls evenly from 14 to -8; what is left at its end is below 1e-6."""
    bar = torch.sigmoid(torch.linspace(14, -8, steps, dtype=torch.float64))
    return Schedule(1 - bar / torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]]))


@pytest.mark.parametrize(("sampler", "order", "tolerance"), [(ddim, 1, 0.05), (dpm_solver_pp, 2, 0.05)])
def test_the_error_falls_with_the_order_that_the_solver_claims(sampler, order, tolerance):
    """Against the exact probability flow: log error over log step, its slope by least squares over 33 to 257 steps."""
    x = normal(100)(0)
    sizes, errors = [], []
    for steps in (33, 65, 129, 257):
        schedule = even_log_snr(steps)
        exact = CORRELATED.flow(x, schedule.alphas_cumprod[-1].item())
        found = sampler(CORRELATED.denoiser(schedule), x, schedule)
        sizes.append(-math.log(steps - 1))
        errors.append((found - exact).norm(dim=1).mean().log().item())
    size, error = torch.tensor(sizes), torch.tensor(errors)
    slope = ((size - size.mean()) * (error - error.mean())).sum() / (size - size.mean()).square().sum()
    assert slope.item() == pytest.approx(order, abs=tolerance)


OBSERVED, BLUR = torch.tensor([0.9, 0.4, -0.2], dtype=torch.float64), 0.15


def posterior() -> Gaussian:
    """x0 given y = x0 + N(0, BLUR) = OBSERVED, by the rule for Gaussians."""
    precision = torch.linalg.inv(CORRELATED.covariance) + torch.eye(3, dtype=torch.float64) / BLUR
    covariance = torch.linalg.inv(precision)
    weighted = torch.linalg.solve(CORRELATED.covariance, CORRELATED.mean) + OBSERVED / BLUR
    return Gaussian(covariance @ weighted, covariance)


def log_likelihood(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """log p(y = OBSERVED | x_t) [b], the perfect noised classifier: y is Gaussian about E[x0 | x_t]."""
    a = SCHEDULE.alphas_cumprod[int(t[0])]
    marginal = a * CORRELATED.covariance + (1 - a) * torch.eye(3, dtype=torch.float64)
    gain = a.sqrt() * torch.linalg.solve(marginal, CORRELATED.covariance).T
    mean = CORRELATED.mean + (x - a.sqrt() * CORRELATED.mean) @ gain.T
    left = CORRELATED.covariance - a.sqrt() * gain @ CORRELATED.covariance
    spread = left + BLUR * torch.eye(3, dtype=torch.float64)
    return -0.5 * ((OBSERVED - mean) * torch.linalg.solve(spread, (OBSERVED - mean).T).T).sum(1)


@pytest.mark.parametrize("step", [0, 100, 500, 900, 999])
def test_a_perfect_classifier_makes_the_denoiser_of_the_posterior(step):
    x, t = normal(50)(0), torch.full((50,), step)
    guided = classifier_guidance(CORRELATED.denoiser(SCHEDULE), log_likelihood, 1.0, SCHEDULE)(x, t)
    exact = posterior().denoiser(SCHEDULE)(x, t)
    assert torch.allclose(guided.x0, exact.x0, atol=1e-6)
    assert torch.allclose(guided.eps, exact.eps, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["score", "mean"])
def test_classifier_guidance_samples_the_posterior(way):
    """Limit and power as above, with 5,000 samples: a mean off by 0.1 deviations or a variance off by 14 %."""
    denoise, noise = CORRELATED.denoiser(SCHEDULE), normal(5000)
    if way == "score":
        x = ddim(classifier_guidance(denoise, log_likelihood, 1.0, SCHEDULE), noise(0), SCHEDULE.respace(250))
    else:
        x = ddpm(denoise, noise(0), SCHEDULE, gradient=log_gradient(log_likelihood, 1.0), noise=noise)
    assert deviation(x, posterior()) < LIMIT


def test_clip_guidance_follows_the_gradient_of_the_cosine():
    """Against finite differences of the normalised dot product, through a random linear image tower."""
    generator = torch.Generator().manual_seed(0)
    tower = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    caption = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    x, t, scale, h = normal(2)(0), torch.full((2,), 300), 4.0, 1e-6

    def cosine(x: torch.Tensor) -> torch.Tensor:
        return torch.cosine_similarity(x @ tower.T, caption)

    steps = h * torch.eye(3, dtype=torch.float64)
    slope = torch.stack([(cosine(x + step) - cosine(x - step)) / (2 * h) for step in steps], 1)
    unguided = CORRELATED.denoiser(SCHEDULE)(x, t)
    with torch.no_grad():
        guided = clip_guidance(CORRELATED.denoiser(SCHEDULE), lambda x, t: x @ tower.T, caption, scale, SCHEDULE)(x, t)
    sigma = (1 - SCHEDULE.alphas_cumprod[300]).sqrt()
    assert torch.allclose(guided.eps, unguided.eps - scale * sigma * slope, atol=1e-7)
    assert torch.allclose(SCHEDULE.q_sample(guided.x0, guided.eps, t), x, atol=1e-9)


@pytest.mark.parametrize(
    ("impossible", "named"),
    [
        (lambda: estimate_gamma([], SCHEDULE), "there are none"),
        (lambda: estimate_gamma([], SCHEDULE.respace(10)), "a whole schedule"),
        (lambda: optimal_variance(SCHEDULE, torch.ones(10)), "has 10 timesteps, and the schedule visits 999"),
        (lambda: optimal_variance(SCHEDULE, -torch.ones(1000)), "none below 0"),
        (lambda: optimal_variance(SCHEDULE, torch.ones(1000), data_variance=0.0), "above 0, not 0.0"),
        (lambda: optimal_variance(SCHEDULE, torch.ones(1000), levels=-1.0), "above 0, not -1.0"),
        (
            lambda: classifier_guidance(lambda x, t: Prediction(x, x), log_likelihood, math.inf, SCHEDULE),
            "finite number.*inf",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_value(impossible, named):
    with pytest.raises(Refused, match=named):
        impossible()
