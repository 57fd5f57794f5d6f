"""Moving averages of the weights: the exponential one, which gets released, and power-function ones (posthoc.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.optim import posthoc
from training.parallel import Vectors


def ema_decay(decay: float, ramp: float, updates: int) -> float:
    """Decay of the update-th update (1, 2, …): `decay`, but the average's reach 1 / (1 - decay), in updates, is never
    more than the fraction `ramp` of the updates so far. A short run thus forgets its random start."""
    return min(decay, 1 - 1 / max(1.0, ramp * updates))


class Ema:
    """A moving average of a model's weights and floating-point buffers (batch norms have such)."""

    def __init__(self, model: nn.Module, flat: Vectors, decay: float, ramp: float) -> None:
        self._model, self._flat, self._decay, self._ramp = model, flat, decay, ramp
        self._weights = flat.weights.detach().clone()
        kept = model.state_dict(keep_vars=True)
        self._live = {name: b for name, b in model.named_buffers() if name in kept and b.is_floating_point()}
        """The model's own, which a forward pass and a checkpoint that is read change in place."""
        self._buffers = {name: buffer.detach().clone() for name, buffer in self._live.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Takes in the model as it is after that many updates."""
        weight = 1 - self.decay(updates)
        self._weights.lerp_(self._flat.weights, weight)
        for name, buffer in self._buffers.items():
            buffer.lerp_(self._live[name], weight)

    def decay(self, updates: int) -> float:
        """What the average keeps of itself at the update-th update."""
        return ema_decay(self._decay, self._ramp, updates)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by name, of parameters and of floating-point buffers: views, to be saved or to be read into."""
        return self._flat.tensors(self._weights) | self._buffers

    def state(self) -> dict[str, Tensor]:
        """The averaged model: a state dict that the model's class can load."""
        averaged = self.tensors()
        return {name: averaged.get(name, tensor) for name, tensor in self._model.state_dict().items()}


class PowerEma(Ema):
    """A power-function average of a relative length: its reach grows with the training."""

    def __init__(self, model: nn.Module, flat: Vectors, length: float) -> None:
        super().__init__(model, flat, 0.0, 1.0)
        self.length = length

    def decay(self, updates: int) -> float:
        """As `posthoc.decay`: 0 at the first update, which thus forgets the start."""
        return posthoc.decay(self.length, updates)
