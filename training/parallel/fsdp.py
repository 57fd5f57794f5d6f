"""FSDP2: a model that one device does not hold. Each rank keeps a shard of every parameter, and gathers the whole of a
block just while it computes with it.

What a rank holds are DTensors cut along their first dimension, and beside them the same numbers in one flat vector, as
`flat.Flat` has the whole model's: so optimiser, moving averages and clipping are the same code for both.
A rank of R keeps 6 numbers for each R-th parameter (weights twice, gradient, two moments, an average) and the whole of
one block at a time, where the flat way keeps 5 for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from training.parallel.flat import Group
from unclip.models import ContextAttention, ResBlock, TransformerBlock


def shard_module(learner: nn.Module, device: torch.device, ranks: int, extra: int) -> Shards:
    """Cuts the `model` of a learner, which rank 0 alone has whole, on its host; every rank calls it.

    A device never holds more of it than a shard and one tensor. Blocks are gathered one by one, what stands between
    them together. Gradients are summed, not averaged, in float32, after each micro-batch, so that no rank ever holds a
    whole gradient.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    model = learner.get_submodule("model")
    named = (*model.named_parameters(), *model.named_buffers())
    start = {name: tensor.detach() for name, tensor in named if not tensor.is_meta}
    model.to("meta")
    mesh = init_device_mesh(device.type, (ranks,))
    cut = partial(fully_shard, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    for unit in _units(model):
        cut(unit)
    cut(learner)
    for module in learner.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    learner.to_empty(device=device)
    scatter_state(learner, start)
    return Shards(model, extra)


def _units(model: nn.Module) -> Iterator[nn.Module]:
    """What is gathered at once. An attention's projections are units of their own, since keys and values of the context
    are made before its forward pass."""
    for module in model.modules():
        if isinstance(module, ResBlock | TransformerBlock):
            yield module
        elif isinstance(module, ContextAttention):
            yield from (part for part in module.children() if isinstance(part, nn.Linear))


class Shards:
    """This rank's shards of a model's trained parameters in one flat vector; see `training.parallel.flat.Vectors`.

    Matrices come first, then vectors, each in the order of registration.
    """

    def __init__(self, model: nn.Module, extra: int) -> None:
        from torch.distributed.tensor import DTensor

        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        names = sorted(named, key=lambda name: named[name].ndim <= 1)
        self._parameters: dict[str, DTensor] = {name: named[name] for name in names}  # type: ignore[misc]
        mine = {name: parameter.to_local() for name, parameter in self._parameters.items()}
        rest = sum(part.numel() for part in mine.values() if part.ndim > 1)
        self.matrices, self.vectors = slice(0, rest), slice(rest, None)
        self.stacks: list[tuple[slice, tuple[int, int, int]]] = []
        self.stacked: set[str] = set()
        self.shapes = {name: part.shape for name, part in mine.items()}
        self.weights = torch.cat([part.detach().flatten() for part in mine.values()])
        self.wire = torch.zeros(len(self.weights) + extra, device=self.weights.device)
        self.gradient, self.extra = self.wire[: len(self.weights)], self.wire[len(self.weights) :]
        for parameter, into in zip(self._parameters.values(), self.split(self.gradient).values(), strict=True):
            parameter.register_post_accumulate_grad_hook(partial(_collect, into))

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """See `Vectors`."""
        views, start = {}, 0
        for name, shape in self.shapes.items():
            stop = start + shape.numel()
            views[name] = vector[start:stop].view(shape)
            start = stop
        return views

    def tensors(self, vector: Tensor) -> dict[str, Tensor]:
        """See `Vectors`."""
        return {name: as_dtensor(view, self._parameters[name]) for name, view in self.split(vector).items()}

    def add(self, group: Group) -> None:
        """See `Vectors`: the backward passes have summed the gradient, shard by shard."""
        group.add(self.extra)

    def norm(self, vector: Tensor) -> float:
        """See `Vectors`."""
        square = vector.norm().double().square()
        torch.distributed.all_reduce(square)
        return math.sqrt(float(square))

    @torch.no_grad()
    def publish(self) -> None:
        """See `Vectors`."""
        parts = [parameter.to_local() for parameter in self._parameters.values()]
        torch._foreach_copy_(parts, list(self.split(self.weights).values()))


def as_dtensor(local: Tensor, like: Any) -> Tensor:
    """A rank's shard as part of a whole that is cut as the DTensor `like` is."""
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def _collect(into: Tensor, parameter: Tensor) -> None:
    """Adds a shard's gradient, just summed over the ranks, to the flat one, and frees it."""
    assert parameter.grad is not None
    into.add_(parameter.grad.to_local())  # type: ignore[attr-defined]
    parameter.grad = None


@torch.no_grad()
def scatter_state(learner: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The inverse of `gather_state`: puts tensors that rank 0 alone has into a sharded model; every rank calls it.

    One after the other is on the device as a whole. Buffers that are not in `state` become rank 0's.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, distribute_tensor

    for module in learner.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what the last forward pass gathered
    model = learner.get_submodule("model")
    for name, there in (*model.named_parameters(), *model.named_buffers()):
        full = torch.empty(there.shape, dtype=there.dtype, device=there.device)
        if name in state or not isinstance(there, DTensor):
            full.copy_(state.get(name, there))
        if isinstance(there, DTensor):
            there.to_local().copy_(distribute_tensor(full, there.device_mesh, there.placements).to_local())
        else:
            torch.distributed.broadcast(full, src=0)
            there.copy_(full)


def gather_state(tensors: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the host, gathered one after the other; every rank calls it, and those that `keep` get them."""
    found = {}
    for name, tensor in tensors:
        # A DTensor: its class is not asked for by name, since a fit without shards would import it, for a second.
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if keep:
            found[name] = full.detach().cpu()
    return found
