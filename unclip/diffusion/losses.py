"""Per-sample losses of diffusion models: the simple loss under three weightings, the hybrid one, and the whole bound.

Losses return [b], so that a trainer can sum over a global batch and log quartiles of t. The bound is not trained on but
reported: how many bits a dimension the model needs for given data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from unclip.config import WEIGHTINGS
from unclip.diffusion.schedule import Denoiser, Schedule
from unclip.errors import Refused


def loss_weights(schedule: Schedule, t: Tensor, kind: str, weighting: str, cap: float = 5.0) -> Tensor:
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
    schedule: Schedule,
    output: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    kind: str,
    weight: Tensor,
    vlb_weight: float = 0.001,
) -> Tensor:
    """L_simple + λ·L_vlb [b] for an output [b, 2c, ...] whose second half is a range of variances.

    The bound trains the variances alone: the mean is detached (Nichol & Dhariwal 2021, section 3.1). L_vlb is the sum
    over the T steps in bits per dimension, estimated as T times the one step t that was drawn for the sample; λ is
    `vlb_weight`, 0.001 in the paper. guided-diffusion writes the same as T/1000 times the step.
    """
    if not vlb_weight >= 0:
        raise Refused(f"vlb_weight must be at least 0, not {vlb_weight}")
    mean_output, fraction = output.chunk(2, dim=1)
    x = schedule.q_sample(x0, noise, t)
    frozen = torch.cat([mean_output.detach(), fraction], 1)
    prediction = schedule.predict(kind, frozen, x, t, learned_range=True)
    log_variance = schedule.log_variance(t, x, prediction.fraction)
    bound = _step_bits(schedule, x0, x, t, prediction.x0, log_variance)
    simple = simple_loss(schedule, mean_output, x0, noise, t, kind, weight)
    return simple + vlb_weight * len(schedule) * bound


class Bound(NamedTuple):
    """The variational bound on −log₂ p(x0), in bits per dimension."""

    total: Tensor
    """[b]: prior + the sum of terms."""
    prior: Tensor
    """[b]: KL(q(x_T | x0) ‖ N(0, 1)), what no network can lower."""
    terms: Tensor
    """[b, steps]: at 0 the discretised decoder's −log p(x0 | x_1), then KL(q(x_{t-1} | x_t, x0) ‖ p(x_{t-1} | x_t))."""


@torch.no_grad()
def bits_per_dim(
    denoise: Denoiser,
    schedule: Schedule,
    x0: Tensor,
    noise: Callable[[int], Tensor],
    variance: str | Tensor | None = None,
) -> Bound:
    """The whole bound (Ho et al. 2020, equation 5) for 8-bit pictures x0 [b, ...] in [-1, 1], one call for each step.

    `schedule` may be respaced: the bound is then that of the shorter process. noise(k), like x0, is drawn once for each
    step k = 0, 1, ... (`unclip.diffusion.samplers.noise_for`); the bound is an unbiased estimate over it. variance: see
    `Schedule.log_variance`. Expects a denoiser without guidance, which is no longer a model of the data.
    """
    last = torch.full((len(x0),), len(schedule) - 1, dtype=torch.long, device=x0.device)
    alpha, sigma = schedule.at("alpha", last, x0), schedule.at("sigma", last, x0)
    prior = 0.5 * ((alpha * x0).square() + sigma.square() - 1 - 2 * sigma.log())
    terms = []
    for step in range(len(schedule)):
        index = torch.full_like(last, step)
        x = schedule.q_sample(x0, noise(step), index)
        prediction = denoise(x, torch.full_like(last, int(schedule.timesteps[step])))
        log_variance = schedule.log_variance(index, x, prediction.fraction, variance)
        terms.append(_step_bits(schedule, x0, x, index, prediction.x0, log_variance))
    prior_bits, steps = prior.flatten(1).mean(1) / math.log(2), torch.stack(terms, 1)
    return Bound(prior_bits + steps.sum(1), prior_bits, steps)


def _step_bits(schedule: Schedule, x0: Tensor, x: Tensor, t: Tensor, predicted: Tensor, log_variance: Tensor) -> Tensor:
    """L_t of the bound [b], in bits per dimension: the decoder's term at t = 0, else the KL to the true posterior."""
    true_mean = schedule.posterior_mean(x0, x, t)
    mean = schedule.posterior_mean(predicted, x, t)
    true_log_variance = schedule.at("min_log_variance", t, x)
    log_ratio = true_log_variance - log_variance
    kl = 0.5 * (-1 - log_ratio + log_ratio.exp() + (true_mean - mean).square() * (-log_variance).exp())
    decoder = -discretised_gaussian(x0, mean, log_variance)
    return torch.where(t == 0, decoder.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)


def discretised_gaussian(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-likelihood of 8-bit levels x in [-1, 1] under a Gaussian integrated over each level's bin (Ho et al., 13)."""
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    above = torch.where(x > 0.999, torch.ones_like(x), normal.cdf(x + 1 / 255))
    below = torch.where(x < -0.999, torch.zeros_like(x), normal.cdf(x - 1 / 255))
    return (above - below).clamp(min=1e-12).log()
