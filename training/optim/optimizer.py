"""AdamW and Muon over flat vectors, learning rate, clipping, and what to do with a step that is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from infra.errors import Refused
from training.optim.muon import assigned, direction, move_
from training.options import TrainConfig
from training.parallel import Group, Vectors

MAX_SKIPPED_IN_A_ROW = 50
ALONE = Group()


class Diverged(Refused):
    """The gradient is not finite any more. It is the sum over the ranks, so all of them raise this at one step."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step 0, 1, …: linear warm-up, then constant or a cosine that would reach 0 at step `steps`."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.decay == "constant" or step < config.warmup:
        return config.lr * warm
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


class Optimiser:
    """AdamW (Loshchilov & Hutter 2019) on the flat vectors of a model, and Muon on its stacks of inner matrices.

    Matrices decay, vectors do not. `updates` counts the steps taken; a step whose gradient is not finite is skipped,
    and counted in `skipped`. `first` is the moving average of the gradient, `second` that of its square (AdamW alone).
    """

    def __init__(self, flat: Vectors, config: TrainConfig, group: Group = ALONE) -> None:
        self.flat, self.config, self._group = flat, config, group
        self._mine = assigned([shape for _, shape in flat.stacks], group.ranks)[group.rank]
        self.updates = 0
        self.skipped = 0
        self._in_a_row = 0
        self.first, self.second = torch.zeros_like(flat.weights), torch.zeros_like(flat.weights)

    def step(self, lr: float, unwanted: Callable[[float], bool] = lambda norm: False) -> float:
        """Clips the gradient, updates the weights unless its norm is not finite or is unwanted; returns that norm."""
        norm = self.flat.norm(self.flat.gradient)
        if not math.isfinite(norm) or unwanted(norm):
            self.skipped += 1
            self._in_a_row += 1
            if self._in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise Diverged(
                    f"the gradient was not finite, or leapt, in {self._in_a_row} steps in a row: training diverged. "
                    "Lower train.lr, or lengthen train.warmup.",
                    code=5,
                )
            return norm
        self._in_a_row = 0
        if self.config.clip_norm and norm > self.config.clip_norm:
            self.flat.gradient.mul_(self.config.clip_norm / norm)
        self.updates += 1
        self._update(lr)
        self.flat.publish()
        return norm

    def state(self) -> dict[str, Tensor]:
        """The moving averages, by name of the parameter: views, to be saved or to be read into."""
        return dict(self._views())

    def resume(self, updates: int, skipped: int) -> None:
        """Goes on from these counters; the averages are read into the views that `state` gives."""
        self.updates, self.skipped, self._in_a_row = updates, skipped, 0

    def _views(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, vector in (("first", self.first), ("second", self.second)):
            for name, view in self.flat.tensors(vector).items():
                if prefix == "first" or name not in self.flat.stacked:
                    yield f"{prefix}.{name}", view

    @torch.no_grad()
    def _update(self, lr: float) -> None:
        config, flat = self.config, self.flat
        self._move_stacks(lr * config.muon / config.lr)
        # The kernel of torch.optim.AdamW(fused=True); torch.optim itself imports the compiler, which takes seconds.
        steps = torch.tensor(float(self.updates), device=self.first.device)
        for part, decay in ((flat.matrices, config.weight_decay), (flat.vectors, 0.0)):
            torch._fused_adamw_(
                [flat.weights[part]],
                [flat.gradient[part]],
                [self.first[part]],
                [self.second[part]],
                [],
                [steps],
                lr=lr,
                beta1=config.beta1,
                beta2=config.beta2,
                weight_decay=decay,
                eps=config.eps,
                amsgrad=False,
                maximize=False,
            )

    def _move_stacks(self, lr: float) -> None:
        """Muon's step. Several ranks share its products: each computes the directions of some matrices, and all get
        them from their sum with the others' zeros, which is exact."""
        flat, decay, shared = self.flat, self.config.weight_decay, self._group.ranks > 1 and bool(self.flat.stacks)
        wire = torch.zeros_like(flat.weights[: flat.stacks[-1][0].stop]) if shared else flat.weights
        for (place, shape), mine in zip(flat.stacks, self._mine, strict=True):
            update = direction(flat.gradient[place].view(shape), self.first[place].view(shape), mine)
            if shared:
                wire[place].view(shape)[mine] = update
            else:
                move_(flat.weights[place].view(shape), update, lr, decay)
        if shared:
            self._group.add(wire)
            for place, shape in flat.stacks:
                move_(flat.weights[place].view(shape), wire[place].view(shape), lr, decay)
