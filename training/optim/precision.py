"""Mixed precision: autocast, and the loss scale that keeps float16's gradients from vanishing.

Weights, gradients, moments and averages stay float32 whatever is chosen (Micikevicius et al. 2018, "Mixed Precision
Training"): autocast turns the inputs of convolutions and matrix products alone, and losses are computed in float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GROWTH, INTERVAL = 2.0, 2000
LEAST = 1.0
"""A scale at which an overflow is the gradient's own: training diverges, and a smaller scale would not help."""


@dataclass
class Scaler:
    """The factor of float16's loss: halved by a gradient that is not finite, doubled after `INTERVAL` steps without
    one, as torch.amp.GradScaler does, on the one flat gradient.

    The gradient is the sum over the ranks, so all of them see the same overflow and keep the same scale.
    """

    scale: float = 2.0**16
    steady: int = 0
    """Finite steps since the scale last changed."""

    def update(self, *, finite: bool) -> None:
        """After a step, whose gradient was finite or not."""
        if not finite:
            self.scale, self.steady = max(LEAST, self.scale / GROWTH), 0
            return
        self.steady += 1
        if self.steady == INTERVAL:
            self.scale, self.steady = self.scale * GROWTH, 0


class Precision:
    """One of `training.options.PRECISIONS` on a device."""

    def __init__(self, name: str, device: torch.device) -> None:
        self._device = device.type
        self._dtype: torch.dtype | None = None if name == "float32" else getattr(torch, name)
        self._scaler = Scaler() if name == "float16" else None

    def autocast(self) -> AbstractContextManager[Any]:
        """What forward passes run in. A thread's own, so that a frozen text tower in the feed stays float32."""
        return torch.autocast(self._device, self._dtype) if self._dtype else nullcontext()

    @property
    def scale(self) -> float:
        """What a loss is multiplied by before its gradient is taken."""
        return self._scaler.scale if self._scaler else 1.0

    @property
    def overflows(self) -> bool:
        """Whether a gradient that is not finite may be the scale's doing rather than training's."""
        return self.scale > LEAST

    def unscale_(self, gradient: Tensor) -> None:
        """Divides the flat gradient by the scale, once, in place; exact, since the scale is a power of two."""
        if self._scaler:
            gradient.div_(self._scaler.scale)

    def update(self, *, finite: bool) -> None:
        """After each step."""
        if self._scaler:
            self._scaler.update(finite=finite)

    @property
    def head(self) -> dict[str, Any]:
        """The scale's state for a checkpoint's head; empty where there is none."""
        return {"scaler": vars(self._scaler).copy()} if self._scaler else {}

    def load(self, head: dict[str, Any]) -> None:
        """The inverse of `head`."""
        if self._scaler:
            self._scaler = Scaler(**head["scaler"])


def in_float32(device: torch.device) -> AbstractContextManager[Any]:
    """Turns autocast off: for what is done to data and for losses, whose digits count."""
    return torch.autocast(device.type, enabled=False)
