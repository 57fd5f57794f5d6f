import pytest
import torch

from unclip.errors import Refused
from unclip.losses import WEIGHTINGS, hybrid_loss, simple_loss, weights
from unclip.schedule import PREDICTIONS, Schedule

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
            SCHEDULE, output_for(kind, guess, x0, noise), x0, noise, T, kind, weights(SCHEDULE, T, kind, weighting)
        )
        for kind in PREDICTIONS
    ]
    for loss in losses[1:]:
        assert torch.allclose(loss, losses[0], rtol=1e-4)


def test_min_snr_plus_one_never_vanishes_and_is_capped():
    x0_weights = weights(SCHEDULE, torch.tensor([0, 999]), "x0", "min_snr_plus_one", cap=6.0)
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


def test_an_unknown_weighting_is_refused():
    with pytest.raises(Refused):
        weights(SCHEDULE, T, "x0", "soft")
