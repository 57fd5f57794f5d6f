"""Modules that are built without their weights: names and shapes on the meta device, at no cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ELEMENTWISE = {"add", "sub", "mul", "rmul", "div", "truediv", "neg", "lt", "le", "gt", "ge", "tril", "triu", "normal"}
"""Names of functions, underscores apart, that give one element for each one: what initialisations need."""


@contextmanager
def weightless() -> Iterator[None]:
    """Tensors that come into being meanwhile are on the meta device, where they take no memory.

    `torch.device("meta")` does the same, but for the first number that a module draws, scales or compares it imports
    torch's compiler, which takes seconds; here such steps are not computed.
    """
    with torch.device("meta"), _Uncomputed():
        yield


class _Uncomputed(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func is torch.eye:
            return torch.empty(*(*args, *args)[:2], **kwargs)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(given) != 1 or not given[0].is_meta or name.strip("_") not in ELEMENTWISE:
            return func(*args, **kwargs)
        (tensor,) = given
        if name.endswith("_") and not name.endswith("__"):  # in place, as all of torch.nn.init are
            return tensor
        one = torch.ones((1,) * tensor.ndim, dtype=tensor.dtype, device="cpu")
        dtype = func(*(one if value is tensor else value for value in args), **kwargs).dtype
        return torch.empty(tensor.shape, dtype=dtype)
