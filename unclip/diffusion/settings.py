"""How one model of a cascade is sampled: the settings, and the guidance and thresholds that they ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from unclip.config import AMOUNT, TIMESTEPS, Range, outside
from unclip.diffusion.guidance import Network, check_guidance, classifier_free, clip_x0, threshold_dynamically
from unclip.diffusion.samplers import SAMPLERS
from unclip.diffusion.schedule import VARIANCES, Denoiser, Schedule
from unclip.errors import Refused


@dataclass(frozen=True)
class Sampling:
    """How one model of the cascade is sampled.

    An autoregressive prior goes by guidance, candidates and temperature alone: it has no process with steps.
    """

    sampler: str = "ddim"
    """One of `samplers.SAMPLERS`: ddpm, ddim, dpm_solver_pp or analytic_dpm."""
    steps: int = 50
    """Timesteps visited."""
    guidance: float = 1.0
    """Classifier-free guidance scale ω; 1 is unguided. Upsamplers take no other."""
    eta: float = 0.0
    """Noise of DDIM, from 0 (deterministic) to 1 (as noisy as DDPM)."""
    candidates: int = 1
    """Samples of the prior, of which the one with the largest z_i·z_t is kept (the paper takes 2)."""

    variance: str | None = None
    """DDPM's: fixed_small, fixed_large or learned_range; None is the model's where it learned one, else fixed_small."""
    interval: tuple[int, int] | None = None
    """First and last timestep at which guidance is on, both included; None is all."""
    rescale: float = 0.0
    """How far guided predictions go back to the unguided ones' contrast, from 0 to 1."""
    percentile: float | None = None
    """Dynamic thresholding of pictures at this share of |x0|, above 0 and at most 1; None clamps to [-1, 1]."""
    gamma: tuple[float, ...] = ()
    """For analytic_dpm: E‖ε̂‖²/d at each timestep of the model's process (analytic.estimate_gamma), in place of
    the table that the release brings."""
    temperature: float = 1.0
    """An autoregressive prior's: logits are divided by it; below 1 likelier tokens, 0 the likeliest alone."""
    labels: dict[str, str] = field(default_factory=dict)
    """Label → class that the release's classifier guides the decoder towards, for instance {"shape": "circle"}."""
    label_guidance: float = 1.0
    """Scale s of that guidance; 0 is unguided, and 1 samples p(x | labels) if both networks are right (Dhariwal &
    Nichol 2021, algorithm 2)."""
    clip_guidance: float = 0.0
    """Scale s of the decoder's guidance by the release's noised CLIP towards the caption (GLIDE, section 2.3); 0 is
    unguided."""

    def __post_init__(self) -> None:
        # Out of JSON they come as lists.
        object.__setattr__(self, "gamma", tuple(self.gamma))
        if self.interval is not None:
            object.__setattr__(self, "interval", tuple(self.interval))
            if len(self.interval) != 2:
                raise Refused(f"interval is {list(self.interval)}; it must be two timesteps, the first and the last")
        if self.sampler not in SAMPLERS:
            raise Refused(f"sampler {self.sampler!r} is unknown; use one of {', '.join(SAMPLERS)}")
        for name in ("steps", "candidates"):
            if not isinstance(getattr(self, name), int):
                raise Refused(f"{name} is {getattr(self, name)}; it must be a whole number")
        if wrong := outside(
            self, steps=TIMESTEPS, candidates=Range(1, 1024), gamma=AMOUNT, interval=Range(0, TIMESTEPS.most)
        ):
            raise Refused(wrong)
        if not math.isfinite(self.guidance) or self.guidance < 0:
            raise Refused(f"guidance must be a finite number, at least 0 (1 is unguided), not {self.guidance}")
        if not 0 <= self.eta <= 1:
            raise Refused(f"eta must lie between 0 and 1, not {self.eta}")
        check_guidance(self.guidance, self.interval, self.rescale)
        if self.variance is not None and self.variance not in VARIANCES:
            raise Refused(f"variance {self.variance!r} is unknown; use one of {', '.join(VARIANCES)}")
        if self.percentile is not None and not 0 < self.percentile <= 1:
            raise Refused(f"percentile must lie above 0 and be at most 1, not {self.percentile}")
        self._check_options()
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise Refused(f"temperature must be a finite number, at least 0, not {self.temperature}")
        for name in ("label_guidance", "clip_guidance"):
            if not math.isfinite(getattr(self, name)) or getattr(self, name) < 0:
                raise Refused(f"{name} must be a finite number, at least 0 (unguided), not {getattr(self, name)}")

    def _check_options(self) -> None:
        """Raises Refused for a setting that is said, and that this sampler does not take."""
        for item in fields(self):
            takers = [name for name, sampler in SAMPLERS.items() if item.name in sampler.options]
            if takers and self.sampler not in takers and getattr(self, item.name) != item.default:
                raise Refused(f"{item.name} is a setting of {' and '.join(takers)}; {self.sampler} has none")

    @property
    def takes_gamma(self) -> bool:
        """Whether its sampler needs a table of γ."""
        return "gamma" in SAMPLERS[self.sampler].options

    def document(self) -> dict[str, Any]:
        """As plain JSON, without what was added since and is at its default: older releases keep their bytes."""
        first, usual = ("sampler", "steps", "guidance", "eta", "candidates"), Sampling()
        return {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name in first or getattr(self, item.name) != getattr(usual, item.name)
        }

    def options(self, *, pictures: bool, gamma: Tensor | None = None) -> dict[str, Any]:
        """Arguments of this sampler beyond those that all share; gamma: the release's table for this model."""
        found = {name: getattr(self, name) for name in SAMPLERS[self.sampler].options}
        if self.takes_gamma:
            # Two levels of noise in the last step are below what one sees (Bao et al. 2022).
            own = torch.tensor(self.gamma, dtype=torch.float64) if self.gamma else gamma
            found |= {"gamma": own, "levels": 2.0 if pictures else None}
        return found


def check_sampling(name: str, sampling: Sampling, *, written: bool = False, gamma: bool = False) -> None:
    """Raises Refused for settings that the component of this name has no use for, or that lack what it needs.

    written: it is an autoregressive prior, which writes tokens and does not denoise. gamma: the release has a table of
    γ for it.
    """
    if name.startswith("upsampler") and (sampling.guidance != 1 or sampling.interval or sampling.rescale):
        raise Refused(f"{name} knows no condition to be guided by; its guidance is 1")
    if name != "decoder" and (sampling.labels or sampling.label_guidance != 1 or sampling.clip_guidance):
        raise Refused(f"labels, label_guidance and clip_guidance are the decoder's, and {name} is another model")
    if name == "prior" and sampling.percentile is not None:
        raise Refused("percentile is for pictures, and the prior makes embeddings")
    if written and (sampling.interval or sampling.rescale):
        raise Refused(f"interval and rescale guide what denoises, and this {name} is autoregressive")
    if sampling.takes_gamma and not (sampling.gamma or gamma or written):
        raise Refused(
            f"{name}: {sampling.sampler} takes its variances from a table of γ, and there is none for this model. A "
            "run of a recipe with sampling.prior.sampler analytic_dpm measures the prior's; "
            "unclip.diffusion.analytic.estimate_gamma any. Or choose another sampler."
        )
    if not written and sampling.temperature != 1:
        raise Refused(f"{name} denoises, and only an autoregressive prior has a temperature; leave it at 1")


def guided_denoiser(network: Network, context: Any, null: Any, sampling: Sampling, schedule: Schedule) -> Denoiser:
    """Classifier-free guidance as the settings want it."""
    options: dict[str, Any] = {"interval": sampling.interval, "rescale": sampling.rescale, "schedule": schedule}
    return classifier_free(network, context, null, sampling.guidance, **options)


def clip_denoiser(denoise: Denoiser, sampling: Sampling, schedule: Schedule) -> Denoiser:
    """Pictures stay in [-1, 1], by static or dynamic thresholding."""
    if sampling.percentile is None:
        return clip_x0(denoise, schedule)
    return threshold_dynamically(denoise, schedule, sampling.percentile)
