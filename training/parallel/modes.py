"""How a model runs while it trains: compiled, in another layout of memory, keeping less for the way back, or the same
each time. The first two change the order of sums and so last bits, as the number of threads does; the others none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from training.job import FitHow
from unclip.clip import ImageBlock, TextBlock
from unclip.models import ContextAttention, ResBlock, SelfAttention, TransformerBlock

BLOCKS = (ResBlock, ContextAttention, SelfAttention, TransformerBlock, TextBlock, ImageBlock)
"""What is computed a second time under `recompute`: blocks of U-Nets and transformers."""


def prepare_model(model: nn.Module, how: FitHow, *, sharded: bool) -> None:
    """Makes the model run as `how` says, before its parameters become views of one vector.

    A sharded model keeps its layout: FSDP2 cuts contiguous tensors alone.
    """
    if how.channels_last and not sharded:
        model.to(memory_format=torch.channels_last)
    if how.recompute:
        recompute(model)
    if how.compile:
        compile_parts(model)


def recompute(model: nn.Module) -> None:
    """Lets each block keep its input alone and be computed again when its gradient is wanted (Chen et al. 2016).

    Dropout draws the same numbers again, and autocast is as it was: the gradient is the same to the bit. A block with
    batch norms is left as it is, since its statistics would be counted twice.
    """
    switch: Any = getattr(model, "set_grad_checkpointing", None)
    if switch is not None:  # open_clip's
        switch(True)
        return
    for module in recomputed(model):
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def recomputed(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks that are computed again; of open_clip's models those that its own switch means, which its ResNets,
    having batch norms, take no notice of."""
    if hasattr(model, "set_grad_checkpointing"):
        # By name, since its class is only there where open_clip is imported.
        return (module for module in model.modules() if type(module).__name__ == "ResidualAttentionBlock")
    return (module for module in model.modules() if isinstance(module, BLOCKS))


def compile_parts(model: nn.Module, backend: str = "inductor") -> None:
    """Compiles what an objective calls: the network and, where captions are read beside it, their reader."""
    text = getattr(model, "text", None)
    towers = [getattr(model, "visual", None), getattr(model, "transformer", None)]
    parts = [part for part in towers if part is not None] or [model]  # CLIP's are called one by one
    if isinstance(text, nn.Module):
        parts.append(text)
    for part in parts:
        part.compile(backend=backend, dynamic=False)


def seed(number: int, device: torch.device) -> None:
    """Seeds what a model draws by itself on that device (dropout), as `torch.manual_seed` does.

    That one also keeps the seed, with a traceback, for every kind of accelerator that this process has not started,
    which takes as long as a twentieth of the demo prior's step.
    """
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


@contextmanager
def determinism(on: bool) -> Iterator[None]:
    """Inside it, operations whose result depends on chance (atomic additions of GPUs) are replaced by ones whose does
    not, or raise where there is none. cuBLAS needs a workspace of a fixed size for it, which is set if nobody did."""
    if not on:  # nor is the mode as it was set again: that imports the compiler, which takes seconds
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
