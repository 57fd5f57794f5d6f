"""Guidance makes a denoiser: it binds a network to a condition, so that samplers know of neither.

The convention, everywhere in unclip:  ε̂ = (1 − ω)·ε(x, ∅) + ω·ε(x, y)

∅ is the null condition, y the condition and ω the `guidance` scale: ω = 1 is unguided (the condition alone), ω = 0 the
unconditional model, ω > 1 guided. So it is in GLIDE, DALL·E 2, Karlo and diffusers (`guidance_scale`); Ho & Salimans
2022 write w = ω − 1.

Wrappers nest, the network inside: clipped(classifier_free(...), ...). What changes the clean sample makes ε agree with
it, so that a wrapper means the same for every sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unclip.diffusion.schedule import Denoiser, Prediction, Schedule
from unclip.errors import Refused

Network = Callable[[Tensor, Tensor, Any], Prediction]
"""(x_t, t, context) → Prediction; a model's `denoise`. A context: a tensor or tuples of such, batch first."""

LogProb = Callable[[Tensor, Tensor], Tensor]
"""(x_t [b, ...], t [b]) → log p(y | x_t) [b] of the wanted y, up to a constant, differentiable in x_t."""


def conditional(network: Network, context: Any) -> Denoiser:
    """The network under one condition."""
    return lambda x, t: network(x, t, context)


def classifier_free(
    network: Network,
    context: Any,
    null: Any,
    scale: float,
    *,
    interval: tuple[int, int] | None = None,
    rescale: float = 0.0,
    schedule: Schedule | None = None,
) -> Denoiser:
    """ε̂ = (1 − ω)·ε(∅) + ω·ε(y) (Ho & Salimans 2022), conditional and unconditional in one batched call.

    ω = 1 calls the network with the condition alone, ω = 0 with the null alone. A learned variance is the conditional
    one (at ω = 0 the unconditional).

    interval: first and last original timestep, both included, at which guidance is on; elsewhere ω is 1 and the network
        is called once (Kynkäänniemi et al. 2024).
    rescale: φ in [0, 1]; the guided clean sample's deviation, over all but the batch, goes this far towards the
        conditional one's, against overexposure (Lin et al. 2023, equations 14-16). It needs `schedule`, the one the
        timesteps belong to. Without guidance (ω of 0 or 1) there is nothing to rescale.
    """
    check_guidance(scale, interval, rescale)
    if rescale and schedule is None:
        raise Refused("rescaled guidance needs the schedule of the network's timesteps")
    only = conditional(network, context)
    if scale == 1:
        return only
    if scale == 0 and interval is None:
        return conditional(network, null)
    both = join(context, null)

    def guided(x: Tensor, t: Tensor) -> Prediction:
        prediction = network(torch.cat([x, x]), torch.cat([t, t]), both)
        # x0 and ε are affine in each other at a fixed x_t, so the same combination holds for both,
        # without dividing by an α_t that is nearly 0 at high noise.
        x0, null_x0 = prediction.x0.chunk(2)
        eps, null_eps = prediction.eps.chunk(2)
        fraction, null_fraction = (None, None) if prediction.fraction is None else prediction.fraction.chunk(2)
        if scale == 0:
            return Prediction(null_x0, null_eps, null_fraction)
        mixed = Prediction((1 - scale) * null_x0 + scale * x0, (1 - scale) * null_eps + scale * eps, fraction)
        if not rescale or schedule is None:
            return mixed
        over = tuple(range(1, x.ndim))
        ratio = x0.std(over, keepdim=True) / mixed.x0.std(over, keepdim=True).clamp(min=1e-12)
        return _with_x0(mixed, (rescale * ratio + 1 - rescale) * mixed.x0, x, t, schedule)

    if interval is None:
        return guided
    first, last = interval

    def within(x: Tensor, t: Tensor) -> Prediction:
        on = (t >= first) & (t <= last)
        if not bool(on.any()):
            return only(x, t)
        if bool(on.all()):
            return guided(x, t)
        inside, outside = guided(x, t), only(x, t)
        choose = on.view(-1, *([1] * (x.ndim - 1)))
        fraction = outside.fraction
        if fraction is not None and inside.fraction is not None:
            fraction = torch.where(choose, inside.fraction, fraction)
        x0, eps = (torch.where(choose, a, b) for a, b in zip(inside[:2], outside[:2], strict=True))
        return Prediction(x0, eps, fraction)

    return within


def check_guidance(scale: float, interval: tuple[int, int] | None, rescale: float) -> None:
    """Raises Refused for settings that `classifier_free` cannot follow."""
    if not math.isfinite(scale):
        raise Refused(f"guidance must be a finite number (1 is unguided), not {scale}")
    if interval is not None and not 0 <= interval[0] <= interval[1]:
        raise Refused(f"a guidance interval is its first and its last timestep, from 0 up, not {tuple(interval)}")
    if not 0 <= rescale <= 1:
        raise Refused(f"rescale must lie between 0 and 1, not {rescale}")


def classifier_guidance(denoise: Denoiser, log_prob: LogProb, scale: float, schedule: Schedule) -> Denoiser:
    """ε̂ = ε − s·σ_t·∇ log p(y | x_t), a noised classifier's guidance as a score (Dhariwal & Nichol 2021, algorithm 2).

    It holds for every sampler; s = 0 is unguided, and s = 1 samples p(x | y) if both networks are right. Algorithm 1,
    which shifts the mean of a DDPM step, is the same in the limit of small steps: `samplers.ddpm(gradient=...)` with
    `log_gradient`.
    """
    gradient = log_gradient(log_prob, scale)

    def guided(x: Tensor, t: Tensor) -> Prediction:
        prediction = denoise(x, t)
        alpha, sigma = schedule.at("alpha", t, x), schedule.at("sigma", t, x)
        shift = sigma * gradient(x, t)
        return Prediction(prediction.x0 + sigma / alpha * shift, prediction.eps - shift, prediction.fraction)

    return guided


def log_gradient(log_prob: LogProb, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """(x_t, t) → s·∇ log p(y | x_t), like x_t; inside `torch.no_grad` too."""
    if not math.isfinite(scale):
        raise Refused(f"a classifier's guidance must be a finite number (0 is unguided), not {scale}")

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return scale * torch.autograd.grad(log_prob(x, t).sum(), x)[0]

    return gradient


def clip_log_prob(embed_image: Callable[[Tensor, Tensor], Tensor], text_embedding: Tensor) -> LogProb:
    """f(x_t, t)·g(c) [b], the cosine of a noised CLIP's image embedding and the caption's (GLIDE, section 2.3)."""
    caption = torch.nn.functional.normalize(text_embedding, dim=-1)
    return lambda x, t: (torch.nn.functional.normalize(embed_image(x, t), dim=-1) * caption).sum(-1)


def clip_guidance(
    denoise: Denoiser,
    embed_image: Callable[[Tensor, Tensor], Tensor],
    text_embedding: Tensor,
    scale: float,
    schedule: Schedule,
) -> Denoiser:
    """CLIP guidance (GLIDE, section 2.3): towards pictures whose noised embedding points where the caption's does.

    embed_image(x_t, t) [b, d] is a CLIP's image tower that was trained on noised pictures; text_embedding [b, d]. Both
    are normalised here, so `scale` includes CLIP's logit scale: GLIDE's s is s·exp(logit scale) here.
    """
    return classifier_guidance(denoise, clip_log_prob(embed_image, text_embedding), scale, schedule)


def clip_x0(denoise: Denoiser, schedule: Schedule, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """Static thresholding: clamps the predicted clean sample to its range; `schedule` is the timesteps' own."""

    def clip(x: Tensor, t: Tensor) -> Prediction:
        prediction = denoise(x, t)
        return _with_x0(prediction, prediction.x0.clamp(low, high), x, t, schedule)

    return clip


def threshold_dynamically(
    denoise: Denoiser, schedule: Schedule, percentile: float = 0.995, most: float = math.inf
) -> Denoiser:
    """Dynamic thresholding (Imagen, Saharia et al. 2022, section 2.3), for pictures in [-1, 1] under strong guidance.

    s is a picture's `percentile` (in (0, 1]) of |x0|, at least 1, which is static thresholding, and at most `most`; x0
    is clamped to [-s, s] and divided by s.
    """
    if not 0 < percentile <= 1:
        raise Refused(f"percentile must lie above 0 and be at most 1, not {percentile}")
    if not most >= 1:
        raise Refused(f"the largest threshold must be at least 1, not {most}")

    def clip(x: Tensor, t: Tensor) -> Prediction:
        prediction = denoise(x, t)
        # One picture at a time: torch.quantile takes 2²⁴ numbers at most, which a few pictures of 1024² exceed.
        sizes = [picture.abs().flatten().quantile(percentile) for picture in prediction.x0]
        s = torch.stack(sizes).clamp(1, most).view(-1, *([1] * (x.ndim - 1)))
        return _with_x0(prediction, prediction.x0.clamp(-s, s) / s, x, t, schedule)

    return clip


def with_known_pixels(denoise: Denoiser, picture: Tensor, free: Tensor, noise: Tensor, schedule: Schedule) -> Denoiser:
    """A denoiser that may draw only where free [b, 1, h, w] is True; elsewhere stands `picture` [b, 3, h, w].

    What the network sees of it is noised by `noise` to the step's level; schedule is the timesteps' own.
    """

    def denoise_free(x: Tensor, t: Tensor) -> Prediction:
        seen = torch.where(free, x, schedule.q_sample(picture, noise, t))
        prediction = denoise(seen, t)
        return _with_x0(prediction, torch.where(free, prediction.x0, picture), x, t, schedule)

    return denoise_free


def _with_x0(prediction: Prediction, x0: Tensor, x: Tensor, t: Tensor, schedule: Schedule) -> Prediction:
    """Another clean sample, with the ε that agrees with it at x_t."""
    eps = (x - schedule.at("alpha", t, x) * x0) / schedule.at("sigma", t, x)
    return Prediction(x0, eps, prediction.fraction)


def join(first: Any, second: Any) -> Any:
    """Concatenate two contexts of one structure along the batch."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    parts = [join(a, b) for a, b in zip(first, second, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
