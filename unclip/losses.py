"""Per-sample losses of diffusion models: the simple loss under three weightings, and the hybrid one.

All return [b], so that a trainer can sum over a global batch and log quartiles of t.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unclip.errors import Refused
from unclip.schedule import Schedule

WEIGHTINGS = ("uniform", "min_snr", "min_snr_plus_one")


def weights(schedule: Schedule, t: Tensor, kind: str, weighting: str, cap: float = 5.0) -> Tensor:
    """Weight [b] of the squared error in the network's own output at t [b].

    `uniform`: 1. `min_snr`: as an x0 loss min(SNR, cap) (Hang et al. 2023). `min_snr_plus_one`: as an x0 loss
    min(SNR + 1, cap), which never vanishes at high noise. Errors in ε and v are SNR and SNR + 1 times those in x0.
    """
    snr = schedule.at("snr", t, t)
    if weighting == "uniform":
        return torch.ones_like(snr)
    if weighting == "min_snr":
        weight = snr.clamp(max=cap)
    elif weighting == "min_snr_plus_one":
        weight = (snr + 1).clamp(max=cap)
    else:
        raise Refused(f"loss weighting {weighting!r} is unknown; use one of {', '.join(WEIGHTINGS)}")
    return weight / {"x0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[kind]


def simple_loss(
    schedule: Schedule, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, kind: str, weight: Tensor
) -> Tensor:
    """Weighted mean squared error [b] between a network's output and its target."""
    error = (output - schedule.target(kind, x0, noise, t)).square()
    return weight * error.flatten(1).mean(1)


def hybrid_loss(
    schedule: Schedule, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, kind: str, weight: Tensor
) -> Tensor:
    """L_simple + 0.001·L_vlb [b] for an output [b, 2c, ...] whose second half is a range of variances.

    The bound trains the variances alone: the mean is detached (Nichol & Dhariwal 2021, section 3.1). It is in bits per
    dimension, and estimated at the one t drawn for the sample, so it is scaled by the number of steps.
    """
    mean_output, fraction = output.chunk(2, dim=1)
    x = schedule.q_sample(x0, noise, t)
    frozen = torch.cat([mean_output.detach(), fraction], 1)
    prediction = schedule.predict(kind, frozen, x, t, learned_range=True)
    assert prediction.log_variance is not None
    true_mean = schedule.posterior_mean(x0, x, t)
    mean = schedule.posterior_mean(prediction.x0, x, t)
    true_log_variance = schedule.at("min_log_variance", t, x)
    log_ratio = true_log_variance - prediction.log_variance
    kl = 0.5 * (-1 - log_ratio + log_ratio.exp() + (true_mean - mean).square() * (-prediction.log_variance).exp())
    decoder = -discretised_gaussian(x0, mean, prediction.log_variance)
    bound = torch.where(t == 0, decoder.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)
    simple = simple_loss(schedule, mean_output, x0, noise, t, kind, weight)
    return simple + 0.001 * len(schedule) * bound


def discretised_gaussian(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-likelihood of 8-bit levels x in [-1, 1] under a Gaussian integrated over each level's bin (Ho et al., 13)."""
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    above = torch.where(x > 0.999, torch.ones_like(x), normal.cdf(x + 1 / 255))
    below = torch.where(x < -0.999, torch.zeros_like(x), normal.cdf(x - 1 / 255))
    return (above - below).clamp(min=1e-12).log()
