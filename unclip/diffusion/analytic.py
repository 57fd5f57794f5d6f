"""Analytic-DPM (Bao et al. 2022): the reverse variance that is optimal for a denoiser, without training one.

It follows from γ_t = E‖ε̂(x_t, t)‖² / d, the share of the noise that a denoiser recognises as noise. A table of γ is a
plain float64 tensor with one number for each timestep of the whole process; `table.tolist()` is its JSON.

The theorem is about ε̂ = E[ε | x_t], so γ is that of the model under its condition, without guidance. A guided ε̂ is no
conditional mean, and x_t of the data is not where it is asked: E‖ε̂‖² measured of it would say nothing. Guided sampling
takes the unguided table; guidance narrows what is sampled, so its variances then are, if anything, too large.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from unclip.diffusion.schedule import Denoiser, Schedule
from unclip.errors import Refused


@torch.no_grad()
def estimate_gamma(batches: Iterable[tuple[Denoiser, Tensor]], schedule: Schedule, *, seed: int = 0) -> Tensor:
    """γ [steps], float64 on the host, averaged over batches of (denoiser, clean samples x0 [b, ...]).

    Each batch brings its denoiser, which is bound to that batch's conditions. `schedule` is the whole process: a batch
    costs as many calls of the network as it has timesteps, but few samples suffice, since γ is a mean over dimensions
    too. Refused for a respaced schedule, or without samples.
    """
    if not torch.equal(schedule.timesteps, torch.arange(len(schedule))):
        raise Refused("γ is estimated over a whole schedule; a respaced one leaves timesteps out")
    generator = torch.Generator().manual_seed(seed)
    total, samples = torch.zeros(len(schedule), dtype=torch.float64), 0
    for denoise, x0 in batches:
        samples += len(x0)
        for step in range(len(schedule)):
            t = torch.full((len(x0),), step, dtype=torch.long, device=x0.device)
            noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0.device)
            eps = denoise(schedule.q_sample(x0, noise, t), t).eps
            total[step] += eps.double().square().flatten(1).mean(1).sum().cpu()
    if not samples:
        raise Refused("γ is a mean over samples, and there are none")
    return total / samples


def optimal_variance(
    schedule: Schedule, gamma: Tensor, *, data_variance: float = 1.0, levels: float | None = None
) -> Tensor:
    """σ² [steps] of the optimal reverse steps of a respaced `schedule` (theorem 1), float64.

    gamma: [T] over the original timesteps, from `estimate_gamma`.
    data_variance: what the variance of x0 given x_t cannot exceed: ((b − a) / 2)² for data in [a, b] (theorem 2), the
        data's own variance where it is standardised. 1 is right for pictures in [-1, 1] and for the prior's embeddings.
    levels: the last step that adds noise changes an 8-bit picture in [-1, 1] by this many of its levels on average, at
        most (the paper's appendix takes 1 or 2); None where samples are no pictures.
    """
    if not math.isfinite(data_variance) or data_variance <= 0:
        raise Refused(f"data_variance must be a finite number above 0, not {data_variance}")
    if levels is not None and not levels > 0:
        raise Refused(f"levels must be above 0, not {levels}")
    if gamma.ndim != 1 or not bool((gamma.isfinite() & (gamma >= 0)).all()):
        raise Refused("a table of γ is a vector of finite numbers, none below 0")
    if len(gamma) <= int(schedule.timesteps.max()):
        raise Refused(
            f"this table of γ has {len(gamma)} timesteps, and the schedule visits {int(schedule.timesteps.max())}; "
            "estimate it over the whole process"
        )
    bar, previous = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    # The variance that x0 still has when x_t is known, a mean over dimensions; the estimate may lie outside its bounds.
    left = ((1 - bar) / bar * (1 - gamma.double().cpu()[schedule.timesteps])).clamp(0, data_variance)
    variance = schedule.posterior_variance + (previous.sqrt() * schedule.betas / (1 - bar)).square() * left
    if len(schedule) > 1:
        # The step to the clean sample adds no noise; for its likelihood σ² must not be 0, as β̃ is there.
        variance[0] = variance[0].clamp(min=float(schedule.posterior_variance[1]))
        if levels is not None:
            # E|σε| = σ·√(2/π), and a level is 2/255 wide.
            variance[1] = variance[1].clamp(max=(levels * 2 / 255) ** 2 * math.pi / 2)
    return variance
