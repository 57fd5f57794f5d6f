"""What a model costs, from its configuration alone; no weight is allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from unclip.clip import build
from unclip.folder import KINDS, config_from


def parameters(kind: str, model: dict[str, Any]) -> int:
    """Trained numbers of a clip, a prior of either kind, a decoder or an upsampler of that (plain) configuration.

    Raises Refused for a configuration that the model refuses. A clip takes open_clip's import, some seconds.
    """
    with _Weightless():
        built = build(model) if kind == "clip" else KINDS[kind][1](config_from(kind, model, kind))
    return sum(parameter.numel() for parameter in built.parameters())


class _Weightless(TorchFunctionMode):
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
