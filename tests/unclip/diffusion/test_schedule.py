import math

import pytest
import torch

from unclip.diffusion.schedule import PREDICTIONS, SPACINGS, Schedule
from unclip.errors import Refused


def test_the_cosine_schedule_is_that_of_diffusers():
    import diffusers

    theirs = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    ours = Schedule.named("cosine")
    assert torch.allclose(ours.betas.float(), theirs.betas, atol=1e-7)
    assert torch.allclose(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-3, atol=1e-7)


def test_the_linear_schedule_is_that_of_diffusers():
    import diffusers

    theirs = diffusers.DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    assert torch.allclose(Schedule.named("linear").betas.float(), theirs.betas, atol=1e-7)


def test_a_respaced_schedule_keeps_noise_levels_and_original_timesteps():
    whole = Schedule.named("cosine")
    few = whole.respace(7)
    assert few.timesteps.tolist() == [0, 166, 333, 500, 666, 832, 999]
    assert torch.allclose(few.alphas_cumprod, whole.alphas_cumprod[few.timesteps])
    assert few.respace(3).timesteps.tolist() == [0, 500, 999]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_spaced_as_in_diffusers(spacing):
    import diffusers

    """At every number of steps at which theirs has that number: their `trailing` has one too many at, say, 61."""
    theirs, karlo = diffusers.DDPMScheduler(timestep_spacing=spacing), diffusers.UnCLIPScheduler()
    schedule, compared = Schedule.named("cosine"), 0
    for steps in [*range(2, 1001, 5), 27, 64, 250, 333, 999, 1000]:
        ours = schedule.respace(steps, spacing=spacing).timesteps.tolist()
        theirs.set_timesteps(steps)
        if len(theirs.timesteps) == steps:
            assert ours == theirs.timesteps.flip(0).tolist(), steps
            compared += 1
        if spacing == "linspace":
            karlo.set_timesteps(steps)
            assert ours == karlo.timesteps.flip(0).tolist(), steps
    assert compared > 190


def test_a_respaced_schedule_that_stops_early_keeps_away_from_the_last_steps():
    whole = Schedule.named("cosine", 100)
    for spacing in SPACINGS:
        few = whole.respace(8, last=20, spacing=spacing).timesteps
        assert len(few.unique()) == 8
        assert 20 <= few.min() <= few.max() <= 99


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_perfect_network_of_any_kind_gives_back_sample_and_noise(kind):
    schedule = Schedule.named("cosine")
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 6, 3, 4, 4, generator=generator)
    t = torch.tensor([0, 10, 300, 500, 700, 900])
    x = schedule.q_sample(x0, noise, t)
    prediction = schedule.predict(kind, schedule.target(kind, x0, noise, t), x, t)
    assert torch.allclose(prediction.x0, x0, atol=1e-4)
    assert torch.allclose(prediction.eps, noise, atol=1e-4)


def test_the_learned_range_runs_from_the_posterior_variance_to_beta():
    schedule = Schedule.named("cosine")
    t = torch.tensor([500])
    x = torch.zeros(1, 1, 2, 2)
    for fraction, variance in ((-1.0, schedule.posterior_variance[500]), (1.0, schedule.betas[500])):
        output = torch.cat([x, torch.full_like(x, fraction)], 1)
        fraction = schedule.predict("eps", output, x, t, learned_range=True).fraction
        log_variance = schedule.log_variance(t, x, fraction)
        assert log_variance[0, 0, 0, 0].item() == pytest.approx(math.log(variance), rel=1e-5)


def test_a_learned_range_is_that_of_the_steps_taken_and_not_of_those_trained_on():
    """A network that says "β" means, at a tenth of the steps, the tenfold β (Nichol & Dhariwal 2021, section 4)."""
    whole = Schedule.named("cosine")
    few = whole.respace(100)
    t, x = torch.tensor([50]), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    found = few.log_variance(t, x, torch.ones_like(x)).exp()[0, 0, 0, 0].item()
    bar = whole.alphas_cumprod[few.timesteps]
    assert found == pytest.approx(1 - (bar[50] / bar[49]).item(), rel=1e-9)
    assert found > 9 * whole.betas[few.timesteps[50]].item()


def test_half_precision_looks_up_noise_levels_in_float32_and_double_in_float64():
    schedule, t = Schedule.named("cosine"), torch.tensor([999])
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        assert schedule.at("alpha", t, torch.zeros(1, dtype=dtype)).dtype == expected
    exact = schedule.at("alpha", t, torch.zeros(1, dtype=torch.float64))
    assert exact.item() == schedule.alphas_cumprod[999].sqrt().item()


def test_what_no_process_can_be_is_refused():
    for impossible in (
        lambda: Schedule.named("cubic"),
        lambda: Schedule.named("cosine", 0),
        lambda: Schedule.named("cosine").respace(1001),
        lambda: Schedule.named("cosine").respace(0),
        lambda: Schedule.named("cosine").respace(981, last=20),
        lambda: Schedule.named("cosine").respace(10, spacing="even"),
        lambda: Schedule(torch.tensor([0.1, 1.5])),
    ):
        with pytest.raises(Refused):
            impossible()
