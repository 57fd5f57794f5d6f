"""Guidance makes a denoiser: it binds a network to a condition, so that samplers know of neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unclip.schedule import Denoiser, Prediction, Schedule

Network = Callable[[Tensor, Tensor, Any], Prediction]
"""(x_t, t, context) → Prediction; a model's `denoise`. A context: a tensor or tuples of such, batch first."""


def conditional(network: Network, context: Any) -> Denoiser:
    """The network under one condition."""
    return lambda x, t: network(x, t, context)


def classifier_free(network: Network, context: Any, null: Any, scale: float) -> Denoiser:
    """ε̂ = (1 − ω)·ε(∅) + ω·ε(y) (Ho & Salimans 2022), conditional and unconditional in one batched call.

    ω = 1 is unguided and calls the network with the condition alone. A learned variance is the conditional one.
    """
    if scale == 1:
        return conditional(network, context)
    both = join(context, null)

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        prediction = network(torch.cat([x, x]), torch.cat([t, t]), both)
        # x0 and ε are affine in each other at a fixed x_t, so the same combination holds for both,
        # without dividing by an α_t that is nearly 0 at high noise.
        x0, null_x0 = prediction.x0.chunk(2)
        eps, null_eps = prediction.eps.chunk(2)
        log_variance = None if prediction.log_variance is None else prediction.log_variance.chunk(2)[0]
        return Prediction((1 - scale) * null_x0 + scale * x0, (1 - scale) * null_eps + scale * eps, log_variance)

    return denoise


def clipped(denoise: Denoiser, schedule: Schedule, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """Clamp the predicted clean sample to its range and make ε agree; `schedule` is the one the timesteps belong to."""

    def clip(x: Tensor, t: Tensor) -> Prediction:
        prediction = denoise(x, t)
        x0 = prediction.x0.clamp(low, high)
        eps = (x - schedule.at("alpha", t, x) * x0) / schedule.at("sigma", t, x)
        return Prediction(x0, eps, prediction.log_variance)

    return clip


def join(first: Any, second: Any) -> Any:
    """Concatenate two contexts of one structure along the batch."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    parts = [join(a, b) for a, b in zip(first, second, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
