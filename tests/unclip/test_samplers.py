"""Whole trajectories against diffusers' schedulers, with one toy network under both."""

import pytest
import torch

from unclip.errors import Refused
from unclip.samplers import SAMPLERS, ddim, ddpm, dpm_solver_pp, noise_for
from unclip.schedule import Prediction, Schedule

diffusers = pytest.importorskip("diffusers")
SCHEDULE = Schedule.named("cosine")
SHAPE = (3, 8, 8)
COMMON = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}


def toy_x0(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A network that depends on what it sees and on when, and stays within the range of pictures."""
    return torch.tanh(0.7 * x.flip(-1) + 0.3 * x + (t.float() / 1000).view(-1, 1, 1, 1))


def denoise(x: torch.Tensor, t: torch.Tensor) -> Prediction:
    return SCHEDULE.predict("x0", toy_x0(x, t), x, t)


def walk(scheduler, x: torch.Tensor, **options) -> torch.Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(toy_x0(x, t.expand(len(x))), t, x, **options).prev_sample
    return x


def sequence(seed: int):
    """Noise in the order in which a scheduler draws it from its generator."""
    generator = torch.Generator().manual_seed(seed)
    return lambda step: torch.randn(2, *SHAPE, generator=generator)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_walks_as_in_diffusers(steps, eta):
    theirs = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="leading", **COMMON)
    theirs.set_timesteps(steps)
    x = noise_for([1, 2], SHAPE)(0)
    few = SCHEDULE.keep(theirs.timesteps.flip(0))
    ours = ddim(denoise, x, few, eta=eta, noise=sequence(7))
    assert torch.allclose(ours, walk(theirs, x, eta=eta, generator=torch.Generator().manual_seed(7)), atol=1e-5)


@pytest.mark.parametrize("steps", [10, 50])
def test_ddpm_walks_as_in_diffusers(steps):
    theirs = diffusers.DDPMScheduler(clip_sample=False, **COMMON)
    few = SCHEDULE.respace(steps)
    theirs.set_timesteps(timesteps=few.timesteps.flip(0).tolist())
    x = noise_for([1, 2], SHAPE)(0)
    ours = ddpm(denoise, x, few, noise=sequence(7))
    assert torch.allclose(ours, walk(theirs, x, generator=torch.Generator().manual_seed(7)), atol=1e-5)


@pytest.mark.parametrize("steps", [5, 20])
def test_dpm_solver_walks_as_in_diffusers(steps):
    theirs = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero", **COMMON
    )
    # Its own table is float32, which is 1e-5 off in the noisiest steps.
    theirs.alphas_cumprod = SCHEDULE.alphas_cumprod
    few = SCHEDULE.respace(steps)
    theirs.set_timesteps(timesteps=few.timesteps.flip(0).tolist())
    x = noise_for([1, 2], SHAPE)(0)
    assert torch.allclose(dpm_solver_pp(denoise, x, few), walk(theirs, x), atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_does_not_depend_on_its_neighbours(name):
    few = SCHEDULE.respace(6)
    together, alone = noise_for([3, 4, 5], SHAPE), noise_for([4], SHAPE)
    both = SAMPLERS[name](denoise, together(0), few, noise=together)
    one = SAMPLERS[name](denoise, alone(0), few, noise=alone)
    assert torch.equal(both[1], one[0])


def test_streams_and_steps_draw_different_noise():
    a, b = noise_for([1], SHAPE, stream="prior"), noise_for([1], SHAPE, stream="decoder")
    assert torch.equal(a(0), a(0))
    assert not torch.equal(a(0), b(0))
    assert not torch.equal(a(0), a(1))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_callback_sees_every_step(name):
    noise, seen = noise_for([1], SHAPE), []
    SAMPLERS[name](denoise, noise(0), SCHEDULE.respace(4), noise=noise, callback=lambda k, x, p: seen.append(k))
    assert seen == [1, 2, 3, 4]


def test_a_sampler_that_adds_noise_refuses_to_go_without():
    x = torch.zeros(1, *SHAPE)
    with pytest.raises(Refused):
        ddpm(denoise, x, SCHEDULE.respace(3))
    with pytest.raises(Refused):
        ddim(denoise, x, SCHEDULE.respace(3), eta=0.5)
