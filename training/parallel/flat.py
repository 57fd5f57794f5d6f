"""Data parallelism over flat vectors: who takes which micro-batches, and one gradient summed in one fixed order.

Weights and gradients of a model lie in one flat vector each, of which its parameters are views: one all-reduce, one
norm, one optimiser kernel and one moving average, whatever the number of layers. (DDP reorders its buckets after the
first step, so that a resumed run would differ.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

STATE_BYTES = 20
"""Bytes a parameter in training: weight, gradient, AdamW's two moments and the moving average, float32 each."""


@dataclass(frozen=True)
class Group:
    """This worker among all."""

    rank: int = 0
    ranks: int = 1

    def lanes(self, lanes: int) -> list[tuple[int, float]]:
        """(lane, weight) of each micro-batch of this rank, m ≡ rank (mod ranks).

        Every rank gets equally many: one that is short repeats a lane with weight 0.
        """
        turns = -(-lanes // self.ranks)
        mine = [self.rank + turn * self.ranks for turn in range(turns)]
        return [(lane, 1.0) if lane < lanes else (lane % lanes, 0.0) for lane in mine]

    def add(self, vector: Tensor) -> None:
        """Replaces the vector by its sum over the ranks, in place."""
        if self.ranks > 1:
            torch.distributed.all_reduce(vector)

    def agreed(self, value: Any) -> Any:
        """Rank 0's value (picklable, small), on every rank."""
        if self.ranks == 1:
            return value
        told = [value]
        torch.distributed.broadcast_object_list(told, src=0)
        return told[0]

    def gather(self, features: Tensor) -> Tensor:
        """features [b, d] of every rank, in rank order, [ranks·b, d]; gradients flow back to where they came from."""
        return features if self.ranks == 1 else _Gather.apply(features, self.rank, self.ranks)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, rank: int, ranks: int) -> Tensor:
        ctx.rank, ctx.rows = rank, len(features)
        parts = [torch.empty_like(features) for _ in range(ranks)]
        torch.distributed.all_gather(parts, features.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.contiguous()
        torch.distributed.all_reduce(total)
        return total[ctx.rank * ctx.rows : (ctx.rank + 1) * ctx.rows], None, None


class Vectors(Protocol):
    """What a rank holds of a model's trained parameters: one vector of weights, one of their gradient.

    The whole of both for `Flat`, a shard of every parameter for `training.parallel.fsdp.Shards`. What walks beside the
    weights (moments, averages) is a vector of the same layout, which `split` and `tensors` give their names back.
    """

    weights: Tensor
    gradient: Tensor
    extra: Tensor
    """A few numbers that `add` sums over the ranks beside the gradient."""
    wire: Tensor
    """Gradient and extra, one behind the other."""
    stacks: list[tuple[slice, tuple[int, int, int]]]
    stacked: set[str]
    matrices: slice
    vectors: slice

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a vector of this layout, by name of the parameter: what this rank has of each."""
        ...

    def tensors(self, vector: Tensor) -> dict[str, Tensor]:
        """The same views as parts of the whole parameters: DTensors where they are shards."""
        ...

    def add(self, group: Group) -> None:
        """Ends a step's backward passes: gradient and extra become their sums over the ranks."""
        ...

    def norm(self, vector: Tensor) -> float:
        """The Euclidean norm of a vector over all ranks; every rank calls it, and gets the same."""
        ...

    def publish(self) -> None:
        """Gives the model the weights as they are now."""
        ...


class Flat:
    """A model's trained parameters as one vector `weights` and its gradient as one vector `gradient`.

    First come the `inner` matrices, those of one shape together, so that each of `stacks` is (place, [k, m, n]); then
    at `matrices` all others; then at `vectors` biases and norms. `extra` numbers stand behind the gradient in `wire`
    and travel with it through the all-reduce. A convolution whose channels lie last in memory keeps them there.
    """

    def __init__(
        self, model: nn.Module, extra: int = 0, inner: Callable[[str, nn.Parameter], bool] | None = None
    ) -> None:
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        stacked = {name for name, parameter in named.items() if inner and inner(name, parameter)}

        def place(name: str) -> tuple[int, tuple[int, ...]]:
            if name in stacked:
                return 0, tuple(named[name].flatten(1).shape)
            return (1 if named[name].ndim > 1 else 2), ()

        names = sorted(named, key=place)  # stable: registration order among equals
        self.shapes = {name: named[name].shape for name in names}
        self._last = {name for name in names if _channels_last(named[name])}
        self.stacks: list[tuple[slice, tuple[int, int, int]]] = []
        start = 0
        for (part, shape), group in groupby(names, key=place):
            count = sum(1 for _ in group) if part == 0 else 0
            if count:
                stop = start + count * shape[0] * shape[1]
                self.stacks.append((slice(start, stop), (count, shape[0], shape[1])))
                start = stop
        rest = start + sum(named[name].numel() for name in names if place(name)[0] == 1)
        self.matrices, self.vectors = slice(start, rest), slice(rest, None)
        self.stacked = stacked
        device = named[names[0]].device
        self.weights = torch.empty(sum(parameter.numel() for parameter in named.values()), device=device)
        self.wire = torch.zeros(len(self.weights) + extra, device=device)
        self.gradient, self.extra = self.wire[: len(self.weights)], self.wire[len(self.weights) :]
        views, gradients = self.split(self.weights), self.split(self.gradient)
        for name, parameter in named.items():
            views[name].copy_(parameter.data)
            parameter.data, parameter.grad = views[name], gradients[name]

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a vector of this layout, by name of the parameter."""
        views, start = {}, 0
        for name, shape in self.shapes.items():
            stop = start + shape.numel()
            part = vector[start:stop]
            if name in self._last:
                out, channels, height, width = shape
                views[name] = part.view(out, height, width, channels).permute(0, 3, 1, 2)
            else:
                views[name] = part.view(shape)
            start = stop
        return views

    def tensors(self, vector: Tensor) -> dict[str, Tensor]:
        """See `Vectors`: every rank has the whole."""
        return self.split(vector)

    def add(self, group: Group) -> None:
        """See `Vectors`: one all-reduce, in one fixed order."""
        group.add(self.wire)

    def norm(self, vector: Tensor) -> float:
        """See `Vectors`."""
        return float(vector.norm())

    def publish(self) -> None:
        """Nothing: the parameters are views of the weights."""


def _channels_last(parameter: Tensor) -> bool:
    """Whether it is a convolution's of that layout and of no other (1×1 ones are of both)."""
    return (
        parameter.ndim == 4
        and not parameter.is_contiguous()
        and parameter.is_contiguous(memory_format=torch.channels_last)
    )
