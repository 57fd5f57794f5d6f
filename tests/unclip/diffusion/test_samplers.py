"""Whole trajectories against diffusers' schedulers, with one toy network under both."""

import functools

import pytest
import torch

from unclip.diffusion.guidance import clip_x0, threshold_dynamically
from unclip.diffusion.samplers import SAMPLERS, ddim, ddim_invert, ddpm, dpm_solver_pp, noise_for
from unclip.diffusion.schedule import PREDICTIONS, Prediction, Schedule
from unclip.errors import Refused

SCHEDULE = Schedule.named("cosine")
SHAPE = (3, 8, 8)
THEIR_NAME = {"x0": "sample", "eps": "epsilon", "v": "v_prediction"}
OPTIONS = {"analytic_dpm": {"gamma": torch.linspace(0.1, 0.99, 1000)}}
"""What a sampler cannot do without."""


def says(kind: str, x0: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The output of this kind by which a network says that the clean sample of x_t is x0."""
    eps = (x - SCHEDULE.at("alpha", t, x) * x0) / SCHEDULE.at("sigma", t, x)
    return SCHEDULE.target(kind, x0, eps, t)


def network(kind: str, x: torch.Tensor, t: torch.Tensor, channels: int = 3, reach: float = 1.0) -> torch.Tensor:
    """An output of this kind that depends on what it sees and on when, its clean sample within ± `reach`.

    With twice the channels, the second half is a range of variances, as learned ones are: roughly from -1 to 1.
    """
    output = says(kind, reach * torch.tanh(0.7 * x.flip(-1) + 0.3 * x + (t.double() / 1000).view(-1, 1, 1, 1)), x, t)
    return output if channels == 3 else torch.cat([output, torch.sin(5 * x.flip(-2))], 1)


def denoiser(kind: str, channels: int = 3, reach: float = 1.0):
    def denoise(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        return SCHEDULE.predict(kind, network(kind, x, t, channels, reach), x, t, learned_range=channels == 6)

    return denoise


denoise = denoiser("x0")


def start() -> torch.Tensor:
    return noise_for([1, 2], SHAPE)(0).double()


def sequence(seed: int):
    """Noise in the order in which a scheduler draws it from its generator."""
    generator = torch.Generator().manual_seed(seed)
    return lambda step: torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)


def theirs(kind: str, name: str, **options):
    """Their scheduler over our betas. Its tables are float32, which is 1e-5 off in the noisiest steps: made float64."""
    import diffusers

    cls = getattr(diffusers, name)
    if name == "UnCLIPScheduler":
        scheduler = cls(prediction_type=THEIR_NAME[kind], clip_sample=False, **options)
    else:
        betas = SCHEDULE.betas.tolist()
        scheduler = cls(trained_betas=betas, prediction_type=THEIR_NAME[kind], **options)
    assert torch.allclose(scheduler.betas.double(), SCHEDULE.betas, rtol=1e-6, atol=1e-7)
    scheduler.betas = SCHEDULE.betas
    scheduler.alphas = 1 - SCHEDULE.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    return scheduler


def walk(scheduler, step, channels: int = 3, reach: float = 1.0) -> torch.Tensor:
    """x_T to x_0 by `step(output, t, x)`, which is the scheduler's step with its own options."""
    kind = {theirs: ours for ours, theirs in THEIR_NAME.items()}[scheduler.config.prediction_type]
    x = start()
    for t in scheduler.timesteps:
        x = step(network(kind, x, t.expand(len(x)), channels, reach), t, x).prev_sample
    return x


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_ddim_walks_as_in_diffusers(kind, eta, steps):
    scheduler = theirs(kind, "DDIMScheduler", clip_sample=False)
    scheduler.set_timesteps(steps)
    step = functools.partial(scheduler.step, eta=eta, generator=torch.Generator().manual_seed(7))
    few = SCHEDULE.respace(steps, spacing="leading")
    ours = ddim(denoiser(kind), start(), few, eta=eta, noise=sequence(7))
    assert torch.allclose(ours, walk(scheduler, step), rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_ddpm_walks_as_in_diffusers(kind, variance, steps):
    channels = 6 if variance == "learned_range" else 3
    scheduler = theirs(kind, "DDPMScheduler", clip_sample=False, variance_type=variance)
    few = SCHEDULE.respace(steps)
    scheduler.set_timesteps(timesteps=few.timesteps.flip(0).tolist())
    step = functools.partial(scheduler.step, generator=torch.Generator().manual_seed(7))
    ours = ddpm(denoiser(kind, channels), start(), few, variance=variance, noise=sequence(7))
    assert torch.allclose(ours, walk(scheduler, step, channels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [7, 25])
@pytest.mark.parametrize("variance", ["fixed_small_log", "learned_range"])
@pytest.mark.parametrize("kind", ["x0", "eps"])
def test_ddpm_walks_as_karlos_scheduler(kind, variance, steps):
    channels = 6 if variance == "learned_range" else 3
    scheduler = theirs(kind, "UnCLIPScheduler", variance_type=variance)
    scheduler.set_timesteps(steps)
    before = {int(t): int(s) for t, s in zip(scheduler.timesteps, scheduler.timesteps[1:], strict=False)}
    generator = torch.Generator().manual_seed(7)

    def step(output, t, x):
        return scheduler.step(output, t, x, prev_timestep=before.get(int(t)), generator=generator)

    ours = ddpm(denoiser(kind, channels), start(), SCHEDULE.respace(steps), noise=sequence(7))
    assert torch.allclose(ours, walk(scheduler, step, channels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_dpm_solver_walks_as_in_diffusers(kind, steps):
    scheduler = theirs(kind, "DPMSolverMultistepScheduler", algorithm_type="dpmsolver++", solver_order=2)
    few = SCHEDULE.respace(steps)
    scheduler.set_timesteps(timesteps=few.timesteps.flip(0).tolist())
    noisiest_first = few.alphas_cumprod.flip(0)
    sigmas = torch.cat([((1 - noisiest_first) / noisiest_first).sqrt(), torch.zeros(1, dtype=torch.float64)])
    assert torch.allclose(scheduler.sigmas.double(), sigmas, rtol=1e-6)
    scheduler.sigmas = sigmas
    ours = dpm_solver_pp(denoiser(kind), start(), few)
    assert torch.allclose(ours, walk(scheduler, scheduler.step), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("most", [1.0, 1.5, 10.0])
def test_thresholds_are_those_of_diffusers(name, most):
    """`most` of 1 is static, of 10 never reached; DDIM makes ε agree with the thresholded sample, as GLIDE does."""
    options = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": most}
    scheduler = theirs("eps", name, clip_sample=False, **options)
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(7)
    extra = {"use_clipped_model_output": True} if name == "DDIMScheduler" else {"generator": generator}
    few = SCHEDULE.respace(10, spacing="leading")
    dynamic = threshold_dynamically(denoiser("eps", reach=3.0), SCHEDULE, 0.9, most)
    sampler = ddim if name == "DDIMScheduler" else ddpm
    ours = sampler(dynamic, start(), few, noise=sequence(7))
    found = walk(scheduler, functools.partial(scheduler.step, **extra), reach=3.0)
    assert torch.allclose(ours, found, rtol=0, atol=1e-5)
    if most == 1:
        static = sampler(clip_x0(denoiser("eps", reach=3.0), SCHEDULE), start(), few, noise=sequence(7))
        assert torch.allclose(static, found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_every_single_posterior_is_that_of_diffusers(variance):
    """Mean and variance of all 1000 steps: a step with noise 0 and a step with noise 1 at each."""
    scheduler = theirs("x0", "DDPMScheduler", clip_sample=False, variance_type=variance)
    scheduler.set_timesteps(1000)
    t = torch.arange(1000)
    x0, x = torch.randn(2, 1000, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, log_variance = SCHEDULE.posterior_mean(x0, x, t), SCHEDULE.log_variance(t, x, variance=variance)
    for step in range(1, 1000):
        at = slice(step, step + 1)
        noise = torch.randn(x[at].shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        found = scheduler.step(x0[at], step, x[at], generator=torch.Generator().manual_seed(step)).prev_sample
        assert torch.allclose(mean[at] + (log_variance[at] / 2).exp() * noise, found, rtol=0, atol=1e-5)
        deviation = scheduler._get_variance(step) ** 0.5
        assert (log_variance[at] / 2).exp().item() == pytest.approx(deviation.item(), rel=1e-5)
    last = scheduler.step(x0[:1], 0, x[:1]).prev_sample
    assert torch.allclose(mean[:1], last, rtol=0, atol=1e-5)


def two_levels(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[x0 | x_t] of pixels that are -0.5 or 0.5 with deviation 0.3: not linear, and a denoiser at every noise level.

    Only such a one has an inverse: `network` above may send two pictures to the same one.
    """
    alpha, sigma = SCHEDULE.at("alpha", t, x), SCHEDULE.at("sigma", t, x)
    marginal = alpha.square() * 0.09 + sigma.square()
    gain = alpha * 0.09 / marginal
    return gain * x + (1 - gain * alpha) * 0.5 * torch.tanh(alpha * 0.5 * x / marginal)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_what_is_inverted_here_comes_back_through_diffusers(kind):
    def denoise(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        return SCHEDULE.predict(kind, says(kind, two_levels(x, t), x, t), x, t)

    scheduler = theirs(kind, "DDIMScheduler", clip_sample=False)
    scheduler.set_timesteps(50)
    x0 = torch.tanh(start())
    few = SCHEDULE.respace(50, spacing="leading")
    found = {}
    for iterations in (1, 2, 4, 12):
        x = ddim_invert(denoise, x0, few, iterations=iterations)
        for t in scheduler.timesteps:
            at = t.expand(len(x))
            x = scheduler.step(says(kind, two_levels(x, at), x, at), t, x).prev_sample
        found[iterations] = (x - x0).abs().max().item()
    assert found[12] < 1e-5
    assert found[2] < found[1] / 2, found
    assert found[4] < found[2] / 4, found


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_does_not_depend_on_its_neighbours(name):
    few = SCHEDULE.respace(6)
    together, alone = noise_for([3, 4, 5], SHAPE), noise_for([4], SHAPE)
    both = SAMPLERS[name](denoise, together(0), few, noise=together, **OPTIONS.get(name, {}))
    one = SAMPLERS[name](denoise, alone(0), few, noise=alone, **OPTIONS.get(name, {}))
    assert torch.equal(both[1], one[0])


def test_streams_and_steps_draw_different_noise():
    a, b = noise_for([1], SHAPE, stream="prior"), noise_for([1], SHAPE, stream="decoder")
    assert torch.equal(a(0), a(0))
    assert not torch.equal(a(0), b(0))
    assert not torch.equal(a(0), a(1))


@pytest.mark.parametrize("name", [*SAMPLERS, "ddim_invert"])
def test_the_callback_sees_every_step(name):
    noise, seen = noise_for([1], SHAPE), []
    options = {"noise": noise, "callback": lambda k, x, p: seen.append(k), **OPTIONS.get(name, {})}
    (SAMPLERS | {"ddim_invert": ddim_invert})[name](denoise, noise(0), SCHEDULE.respace(4), **options)
    assert seen == [1, 2, 3, 4]


def test_a_sampler_that_adds_noise_refuses_to_go_without():
    x = torch.zeros(1, *SHAPE)
    with pytest.raises(Refused):
        ddpm(denoise, x, SCHEDULE.respace(3))
    with pytest.raises(Refused):
        ddim(denoise, x, SCHEDULE.respace(3), eta=0.5)


@pytest.mark.parametrize(
    ("sampler", "options", "named"),
    [
        (ddim, {"eta": 1.5}, "eta must lie between 0 and 1, not 1.5"),
        (ddim, {"eta": -0.1}, "eta must lie between 0 and 1, not -0.1"),
        (ddim_invert, {"iterations": 0}, "at least 1 iteration a step, not 0"),
        (ddpm, {"variance": "fixed"}, "variance 'fixed' is unknown; use one of fixed_small"),
        (ddpm, {"variance": "learned_range"}, "this network has learned none"),
        (ddpm, {"variance": torch.ones(4)}, "one positive number for each of the 3 steps"),
        (ddpm, {"variance": torch.tensor([1.0, 0.0, 1.0])}, "one positive number"),
        (SAMPLERS["analytic_dpm"], {}, "needs gamma"),
    ],
)
def test_what_no_sampler_can_do_is_refused_with_the_reason(sampler, options, named):
    noise = noise_for([1], SHAPE)
    with pytest.raises(Refused, match=named):
        sampler(denoise, noise(0), SCHEDULE.respace(3), noise=noise, **options)
