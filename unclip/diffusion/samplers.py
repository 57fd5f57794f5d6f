"""Samplers: pure functions from a denoiser and noise x_T to a sample, all of one shape.

`schedule` is the respaced process to walk; what the denoiser is told are its original timesteps. `noise(k)` gives the
noise of step k, one draw per picture from that picture's own seed, so that a picture does not depend on its neighbours.
`callback(k, x, prediction)` sees every step; progress bars and previews live there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unclip.diffusion.analytic import optimal_variance
from unclip.diffusion.schedule import Denoiser, Prediction, Schedule
from unclip.errors import Refused

Noise = Callable[[int], Tensor]
Callback = Callable[[int, Tensor, Prediction], None]


def noise_for(
    seeds: Sequence[int], shape: Sequence[int], *, stream: str = "", device: torch.device | str = "cpu"
) -> Noise:
    """noise(k) → standard normal [len(seeds), *shape]; row i depends on seeds[i], `stream` and k alone.

    `stream` keeps the models of a cascade apart. k = 0 is x_T; the samplers ask for 1, 2, ... Drawn on the host, so
    that a seed means the same picture on every device.
    """

    def draw(step: int) -> Tensor:
        rows = []
        for seed in seeds:
            digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            rows.append(torch.randn(tuple(shape), generator=generator))
        return torch.stack(rows).to(device)

    return draw


def ddpm(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    *,
    variance: str | Tensor | None = None,
    gradient: Callable[[Tensor, Tensor], Tensor] | None = None,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2).

    variance: `fixed_small`, `fixed_large`, `learned_range`, or σ² [steps]; None is the network's where it has learned
    one, else `fixed_small`. gradient(x_t, t) shifts the mean by σ²·gradient (Dhariwal & Nichol 2021, algorithm 1);
    `unclip.diffusion.guidance.log_gradient` makes one of a classifier.
    """
    if noise is None:
        raise Refused("DDPM sampling adds noise at every step; give it noise=noise_for(seeds, shape)")
    for k, (index, t) in enumerate(_walk(schedule, x), start=1):
        prediction = denoise(x, t)
        if callback is not None:
            callback(k, x, prediction)
        mean = schedule.posterior_mean(prediction.x0, x, index)
        log_variance = schedule.log_variance(index, x, prediction.fraction, variance)
        if gradient is not None:
            mean = mean + log_variance.exp() * gradient(x, t)
        if k == len(schedule):
            return mean
        x = mean + (0.5 * log_variance).exp() * noise(k)
    return x


def analytic_dpm(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    *,
    gamma: Tensor | None = None,
    data_variance: float = 1.0,
    levels: float | None = None,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling with the optimal variances (Bao et al. 2022), by which few steps suffice.

    gamma: E‖ε̂‖²/d of this denoiser at every original timestep [T], from `analytic.estimate_gamma`; the other two
    bound the variances, see `analytic.optimal_variance`. It is the sampler of the paper's prior, in 64 steps.
    """
    if gamma is None:
        raise Refused(
            "Analytic-DPM needs gamma, E‖ε̂‖²/d at every timestep; unclip.diffusion.analytic.estimate_gamma measures it"
        )
    variance = optimal_variance(schedule, gamma, data_variance=data_variance, levels=levels)
    return ddpm(denoise, x, schedule, variance=variance, noise=noise, callback=callback)


def ddim(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (Song et al. 2020, equation 12); eta from 0, deterministic, to 1, as noisy as DDPM with β̃."""
    if not 0 <= eta <= 1:
        raise Refused(f"eta must lie between 0 and 1, not {eta}")
    if eta and noise is None:
        raise Refused("DDIM with eta above 0 adds noise at every step; give it noise=noise_for(seeds, shape)")
    for k, (index, t) in enumerate(_walk(schedule, x), start=1):
        prediction = denoise(x, t)
        if callback is not None:
            callback(k, x, prediction)
        if k == len(schedule):
            return prediction.x0
        alpha, sigma = schedule.at("alpha", index - 1, x), schedule.at("sigma", index - 1, x)
        added = eta * schedule.posterior_variance[int(index[0])].sqrt().item()
        x = alpha * prediction.x0 + (sigma.square() - added**2).clamp(min=0).sqrt() * prediction.eps
        if eta and noise is not None:
            x = x + added * noise(k)
    return x


def ddim_invert(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    *,
    iterations: int = 1,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """From a clean sample to the x_T from which DDIM (eta 0) with this denoiser and schedule gives it back.

    A step of DDIM is a rotation, x_s = cos δ·x_t − sin δ·v̂(x_t, t) with v̂ = α_t·ε̂ − σ_t·x̂0 (Salimans & Ho 2022,
    appendix D). Solved for x_t it asks for v̂ at x_t, which is not known yet: the first iteration asks at x_s instead
    and errs by the size of a step; each further one asks again at what was found, and is nearer to the exact inverse by
    a factor of the size of a step (fixed-point inversion, Pan et al. 2023; in v̂ and not in ε̂, since v̂ changes slowly at
    every noise level). Each iteration is one call of the network a step. A network that predicts ε should be clipped
    here as in sampling: at high noise its x̂0, and so v̂, is anything. `noise` is unused; all are called alike.
    """
    if iterations < 1:
        raise Refused(f"DDIM inversion takes at least 1 iteration a step, not {iterations}")
    angles = torch.atan2((1 - schedule.alphas_cumprod).sqrt(), schedule.alphas_cumprod.sqrt()).tolist()
    below = 0.0
    for k, (index, t) in enumerate(_walk(schedule, x, upward=True), start=1):
        angle = angles[int(index[0])]
        guess = x
        for _ in range(iterations):
            prediction = denoise(guess, t)
            velocity = math.cos(angle) * prediction.eps - math.sin(angle) * prediction.x0
            guess = (x + math.sin(angle - below) * velocity) / math.cos(angle - below)
        if callback is not None:
            callback(k, x, prediction)
        x, below = guess, angle
    return x


def dpm_solver_pp(
    denoise: Denoiser, x: Tensor, schedule: Schedule, *, noise: Noise | None = None, callback: Callback | None = None
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), deterministic; the last step goes to the clean sample.

    `noise` is unused and there so that every sampler can be called alike.
    """
    log_snr = 0.5 * (schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)).log()
    bar = schedule.alphas_cumprod
    previous: Prediction | None = None
    for k, (index, t) in enumerate(_walk(schedule, x), start=1):
        prediction = denoise(x, t)
        if callback is not None:
            callback(k, x, prediction)
        if k == len(schedule):
            return prediction.x0
        here = int(index[0])
        step = log_snr[here - 1] - log_snr[here]
        data = prediction.x0
        if previous is not None:
            ratio = float((log_snr[here] - log_snr[here + 1]) / step)
            data = data + (data - previous.x0) / (2 * ratio)
        scale = float(((1 - bar[here - 1]) / (1 - bar[here])).sqrt())
        x = scale * x - float(bar[here - 1].sqrt() * torch.expm1(-step)) * data
        previous = prediction
    return x


@dataclass(frozen=True)
class Sampler:
    """What makes samples of noise, and how it is called."""

    function: Callable[..., Tensor]
    options: tuple[str, ...] = ()
    """Fields of `settings.Sampling` that it takes as arguments of the same names, beside those that all samplers share.
    Others refuse them. With `gamma` comes `levels`."""

    def __call__(self, denoise: Denoiser, x: Tensor, schedule: Schedule, **options: Any) -> Tensor:
        """A sample: see the function."""
        return self.function(denoise, x, schedule, **options)


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm, ("variance",)),
    "ddim": Sampler(ddim, ("eta",)),
    "dpm_solver_pp": Sampler(dpm_solver_pp),
    "analytic_dpm": Sampler(analytic_dpm, ("gamma",)),
}
"""Every sampler, by the name that settings call it."""


def _walk(schedule: Schedule, x: Tensor, *, upward: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs ([b] index into the schedule, [b] original timestep), the noisiest first, or last if `upward`."""
    ones = torch.ones(len(x), dtype=torch.long, device=x.device)
    for index in range(len(schedule)) if upward else reversed(range(len(schedule))):
        yield ones * index, ones * int(schedule.timesteps[index])
