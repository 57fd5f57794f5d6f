"""Noise levels of a discrete diffusion process: tables, posteriors, and conversions between x0, ε and v.

Every table is float64 on the host; a lookup returns float32 (float64 for float64 samples) on the device of the
timesteps, shaped to broadcast over a batch. A respaced schedule visits fewer timesteps but keeps telling the network
the original ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from unclip.errors import Refused

PREDICTIONS = ("x0", "eps", "v")
SCHEDULES = ("cosine", "linear")
SPACINGS = ("linspace", "leading", "trailing")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")


class Prediction(NamedTuple):
    """What a network says about x_t: the clean sample and the noise, both [b, ...]."""

    x0: Tensor
    eps: Tensor
    fraction: Tensor | None = None
    """Where the network learns a range of variances: log σ² between log β̃ (-1) and log β (1), [b, ...].

    A fraction and not the variance, since β̃ and β are those of the steps that a sampler takes, and the network only
    knows those that it was trained on (Nichol & Dhariwal 2021, section 4)."""


Denoiser = Callable[[Tensor, Tensor], Prediction]
"""(x_t [b, ...], t [b] int64 original timesteps) → Prediction."""


def cosine_betas(steps: int, max_beta: float = 0.999) -> Tensor:
    """β_t of the cosine schedule (Nichol & Dhariwal 2021, equation 17), float64 [steps]."""

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor(
        [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), max_beta) for i in range(steps)],
        dtype=torch.float64,
    )


def linear_betas(steps: int) -> Tensor:
    """β_t from 1e-4 to 0.02 at 1000 steps (Ho et al. 2020), scaled to end as noisy at any number of steps; [steps]."""
    scale = 1000 / steps
    return torch.linspace(1e-4 * scale, min(0.02 * scale, 0.999), steps, dtype=torch.float64)


def check_process(owner: str, prediction: str, schedule: str) -> None:
    """Raises Refused for a prediction or a noise schedule that there is not."""
    for what, name, known in (("prediction", prediction, PREDICTIONS), ("schedule", schedule, SCHEDULES)):
        if name not in known:
            raise Refused(f"{owner}: {what} {name!r} is unknown; use one of {', '.join(known)}")


class Schedule:
    """Tables over the steps of one process, index 0 the least noisy.

    Attributes, all float64 [steps] on the host: `betas`, `alphas_cumprod` (ᾱ), `alphas_cumprod_prev`,
    `posterior_variance` (β̃, Ho et al. 2020, equation 7); `timesteps` int64 [steps], what the network is told.
    """

    def __init__(self, betas: Tensor, timesteps: Tensor | None = None) -> None:
        if betas.ndim != 1 or not bool(((betas > 0) & (betas < 1)).all()):
            raise Refused("a noise schedule needs a vector of betas, each between 0 and 1")
        self.betas = betas.double()
        self.timesteps = torch.arange(len(betas)) if timesteps is None else timesteps
        self.alphas_cumprod = torch.cumprod(1 - self.betas, 0)
        self.alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self._tables: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    @classmethod
    def named(cls, name: str, steps: int = 1000) -> Schedule:
        """`cosine` or `linear` over `steps` timesteps."""
        if steps < 1:
            raise Refused(f"a noise schedule needs at least one timestep, not {steps}")
        if name == "cosine":
            return cls(cosine_betas(steps))
        if name == "linear":
            return cls(linear_betas(steps))
        raise Refused(f"noise schedule {name!r} is unknown; use one of {', '.join(SCHEDULES)}")

    def __len__(self) -> int:
        return len(self.betas)

    def respace(self, steps: int, *, last: int = 0, spacing: str = "linspace") -> Schedule:
        """The process over `steps` of these timesteps, evenly spaced over the indices from `last` on.

        spacing, named as by Lin et al. 2023 (table 2): `linspace` has both ends (one step is the noisiest), `leading`
        begins at `last` and may stop short of the noisiest, `trailing` ends with the noisiest.
        """
        indices = len(self) - last
        if not 1 <= steps <= indices or last < 0:
            raise Refused(f"cannot take {steps} steps from timesteps {last} to {len(self) - 1}")
        if spacing == "linspace":
            # By a stride and not by torch.linspace, which comes to other last bits: at 27 steps the middle is a tie,
            # and numpy, so diffusers too, says 499.
            stride = (indices - 1) / max(steps - 1, 1)
            index = last + (torch.arange(steps, dtype=torch.float64) * stride).round().long()
            index[-1] = len(self) - 1
        elif spacing == "leading":
            index = last + torch.arange(steps) * (indices // steps)
        elif spacing == "trailing":
            # As numpy.arange, whose stride is the difference of its first two numbers: ties fall as in diffusers.
            stride = indices - (indices - indices / steps)
            down = indices - torch.arange(steps, dtype=torch.float64) * stride
            index = last - 1 + down.round().long().flip(0)
        else:
            raise Refused(f"spacing {spacing!r} is unknown; use one of {', '.join(SPACINGS)}")
        return self.keep(index)

    def keep(self, index: Tensor) -> Schedule:
        """The process over the steps at these ascending indices; their noise levels stay (Nichol & Dhariwal, 4)."""
        kept = self.alphas_cumprod[index]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        return Schedule(1 - kept / previous, self.timesteps[index])

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Entries t [b] of a derived table (see `_derive`), shaped [b, 1, ...] to broadcast over `like`.

        float64 if `like` is, else float32: half precision would lose the small noise levels.
        """
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        tables = self._tables.get((t.device, dtype))
        if tables is None:
            tables = {key: value.to(t.device, dtype) for key, value in self._derive().items()}
            self._tables[t.device, dtype] = tables
        return tables[name][t].view(-1, *([1] * (like.ndim - 1)))

    def _derive(self) -> dict[str, Tensor]:
        bar, previous, beta = self.alphas_cumprod, self.alphas_cumprod_prev, self.betas
        # β̃_0 is 0; its logarithm is taken from the step above it (Nichol & Dhariwal 2021, section 3.1), as Ho et al. do
        # for β too: only the likelihood of the last step depends on it.
        floor = self.posterior_variance[1] if len(self) > 1 else beta[0]
        return {
            "alpha": bar.sqrt(),
            "sigma": (1 - bar).sqrt(),
            "snr": bar / (1 - bar),
            "posterior_x0": previous.sqrt() * beta / (1 - bar),
            "posterior_xt": (1 - beta).sqrt() * (1 - previous) / (1 - bar),
            "min_log_variance": torch.cat([floor[None], self.posterior_variance[1:]]).log(),
            "max_log_variance": beta.log(),
            "large_log_variance": torch.cat([floor[None], beta[1:]]).log(),
        }

    def q_sample(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = α_t·x0 + σ_t·ε for t [b]."""
        return self.at("alpha", t, x0) * x0 + self.at("sigma", t, x0) * noise

    def posterior_mean(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x0) (Ho et al. 2020, equation 7)."""
        return self.at("posterior_x0", t, x) * x0 + self.at("posterior_xt", t, x) * x

    def log_variance(
        self, t: Tensor, like: Tensor, fraction: Tensor | None = None, variance: str | Tensor | None = None
    ) -> Tensor:
        """log σ² of the reverse step at t [b], broadcastable over `like` [b, ...].

        variance: `fixed_small` (β̃), `fixed_large` (β), `learned_range` (by the network's `fraction`), or a table of σ²
        [steps]; None is the network's own where it has learned one, else `fixed_small`.
        """
        if isinstance(variance, Tensor):
            if variance.shape != self.betas.shape or not bool((variance > 0).all()):
                raise Refused(f"a table of variances has one positive number for each of the {len(self)} steps")
            table = variance.log().to(t.device, torch.float64 if like.dtype == torch.float64 else torch.float32)
            return table[t].view(-1, *([1] * (like.ndim - 1)))
        if variance is None:
            variance = "fixed_small" if fraction is None else "learned_range"
        if variance == "fixed_small":
            return self.at("min_log_variance", t, like)
        if variance == "fixed_large":
            return self.at("large_log_variance", t, like)
        if variance == "learned_range":
            if fraction is None:
                raise Refused("variance learned_range: this network has learned none; use fixed_small or fixed_large")
            low, high = self.at("min_log_variance", t, like), self.at("max_log_variance", t, like)
            return low + (fraction + 1) / 2 * (high - low)
        raise Refused(f"variance {variance!r} is unknown; use one of {', '.join(VARIANCES)}")

    def target(self, kind: str, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a network of this kind (`x0`, `eps`, `v`) should output for x0 under this noise."""
        if kind == "x0":
            return x0
        if kind == "eps":
            return noise
        if kind == "v":
            return self.at("alpha", t, x0) * noise - self.at("sigma", t, x0) * x0
        raise Refused(f"prediction {kind!r} is unknown; use one of {', '.join(PREDICTIONS)}")

    def predict(self, kind: str, output: Tensor, x: Tensor, t: Tensor, *, learned_range: bool = False) -> Prediction:
        """Read a network's output [b, c, ...] (or [b, 2c, ...] with a learned range of variances) as a Prediction."""
        fraction = None
        if learned_range:
            output, fraction = output.chunk(2, dim=1)
        alpha, sigma = self.at("alpha", t, x), self.at("sigma", t, x)
        if kind == "x0":
            return Prediction(output, (x - alpha * output) / sigma, fraction)
        if kind == "eps":
            return Prediction((x - sigma * output) / alpha, output, fraction)
        if kind == "v":
            return Prediction(alpha * x - sigma * output, sigma * x + alpha * output, fraction)
        raise Refused(f"prediction {kind!r} is unknown; use one of {', '.join(PREDICTIONS)}")
