"""Samplers: pure functions from a denoiser and noise x_T to a sample, all of one shape.

`schedule` is the respaced process to walk; what the denoiser is told are its original timesteps. `noise(k)` gives the
noise of step k, one draw per picture from that picture's own seed, so that a picture does not depend on its neighbours.
`callback(k, x, prediction)` sees every step; progress bars and previews live there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unclip.errors import Refused
from unclip.schedule import Denoiser, Prediction, Schedule

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
    denoise: Denoiser, x: Tensor, schedule: Schedule, *, noise: Noise | None = None, callback: Callback | None = None
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), with the network's variances where it learns them, else β̃."""
    if noise is None:
        raise Refused("DDPM sampling adds noise at every step; give it noise=noise_for(seeds, shape)")
    for k, (index, t) in enumerate(_walk(schedule, x), start=1):
        prediction = denoise(x, t)
        if callback is not None:
            callback(k, x, prediction)
        mean = schedule.posterior_mean(prediction.x0, x, index)
        if k == len(schedule):
            return mean
        log_variance = prediction.log_variance
        if log_variance is None:
            log_variance = schedule.at("min_log_variance", index, x)
        x = mean + (0.5 * log_variance).exp() * noise(k)
    return x


def ddim(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (Song et al. 2020, equation 12); eta 0 is deterministic, 1 is as noisy as DDPM."""
    if eta and noise is None:
        raise Refused("DDIM with eta above 0 adds noise at every step; give it noise=noise_for(seeds, shape)")
    for k, (index, t) in enumerate(_walk(schedule, x), start=1):
        prediction = denoise(x, t)
        if callback is not None:
            callback(k, x, prediction)
        if k == len(schedule):
            return prediction.x0
        alpha, sigma = schedule.at("alpha", index - 1, x), schedule.at("sigma", index - 1, x)
        added = eta * schedule.posterior_variance[index[0].item()].sqrt().item()
        x = alpha * prediction.x0 + (sigma.square() - added**2).clamp(min=0).sqrt() * prediction.eps
        if eta and noise is not None:
            x = x + added * noise(k)
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


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ddpm": ddpm, "ddim": ddim, "dpm_solver_pp": dpm_solver_pp}


def _walk(schedule: Schedule, x: Tensor):
    """Pairs ([b] index into the schedule, [b] original timestep), the noisiest first."""
    ones = torch.ones(len(x), dtype=torch.long, device=x.device)
    for index in reversed(range(len(schedule))):
        yield ones * index, ones * int(schedule.timesteps[index])
