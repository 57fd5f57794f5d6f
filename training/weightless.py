"""Models without their weights: shapes on the meta device, for counting and for ranks that get their shards later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from unclip.folder import KINDS


class Weightless(TorchFunctionMode):
    """Weights come into being by `torch.empty`: here on the meta device, where they take no memory.

    `torch.device("meta")` would send every factory there; for some that imports the compiler, which takes seconds.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def shapes(kind: str, config: Any) -> nn.Module:
    """A model of that kind (not open_clip's) and configuration, all of it on the meta device."""
    with Weightless():
        return KINDS[kind][1](config).to("meta")
