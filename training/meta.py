"""Models without their weights: shapes on the meta device, for counting and for ranks that get their shards later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from unclip.meta import weightless
from unclip.release import KINDS


class Weightless(TorchFunctionMode):
    """What a traced pass makes by `torch.empty` is on the meta device, where it takes no memory."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def shapes(kind: str, config: Any) -> nn.Module:
    """A model of that kind (not open_clip's) and configuration, all of it on the meta device."""
    with weightless():
        return KINDS[kind].module(config)
