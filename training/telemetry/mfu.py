"""How much of the hardware training uses: model FLOPs utilisation (MFU; Chowdhery et al. 2022, appendix B)."""

from __future__ import annotations

import json
import time
from functools import cache

import torch

from training.cost import cost
from training.job import FitHow, Job

_SIDE = {"cuda": 8192, "cpu": 512}
_TRIES = 8


class Utilisation:
    """The share of the workers' peak that the model's own operations take; what is computed twice counts once.

    Tracing the model and, where `how` does not say the peak, measuring it takes some two seconds, the tracing once a
    process.
    """

    def __init__(self, job: Job, how: FitHow, device: torch.device, ranks: int) -> None:
        self.flops = _flops(job.kind, json.dumps(job.model), getattr(job.config, "crop", None))
        """Of one sample's forward and backward pass."""
        self.peak = ranks * (how.peak_tflops * 1e12 or matmul_peak(device, computed_in(job)))
        """Operations a second of all workers."""

    def of(self, samples_per_s: float) -> float:
        """MFU at that rate: above 1 only where the measured peak was disturbed."""
        return samples_per_s * self.flops / self.peak


def computed_in(job: Job) -> torch.dtype:
    """The type that a job's matrix products and convolutions are computed in."""
    if getattr(job.config, "bfloat16_convolutions", False):
        return torch.bfloat16
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(job.config.precision, torch.float32)


@cache
def _flops(kind: str, model: str, crop: int | None) -> int:
    return cost(kind, json.loads(model), crop).flops


@torch.no_grad()
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of some products of square matrices, on this thread's share of the machine.

    It draws from a generator of its own.
    """
    side = _SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    out, best = a @ b, float("inf")  # the first one is slower
    for _ in range(_TRIES):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best
