"""The mathematics of diffusion: noise schedules, losses, samplers and guidance, without a network.

In goes a denoiser, a function of x_t and t; out comes a sample. Every function names the equation that it computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unclip.lazy import exports

if TYPE_CHECKING:
    from unclip.diffusion.analytic import estimate_gamma
    from unclip.diffusion.guidance import (
        LogProb,
        Network,
        classifier_guidance,
        clip_guidance,
        clip_x0,
        conditional,
        join,
        with_known_pixels,
    )
    from unclip.diffusion.losses import hybrid_loss, loss_weights, simple_loss
    from unclip.diffusion.samplers import SAMPLERS, Noise, ddim_invert, noise_for
    from unclip.diffusion.schedule import Denoiser, Prediction, Schedule, check_process
    from unclip.diffusion.settings import Sampling, check_sampling, clip_denoiser, guided_denoiser
else:
    __getattr__ = exports(__name__)
