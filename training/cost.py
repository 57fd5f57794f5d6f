"""What a model costs, from its configuration alone: parameters, operations and memory. No weight is allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from training.parallel import STATE_BYTES
from training.weightless import Weightless, shapes
from unclip.ar_prior import AutoregressivePrior
from unclip.clip import build
from unclip.decoder import Decoder
from unclip.folder import config_from
from unclip.prior import DiffusionPrior
from unclip.upsampler import Upsampler
from unclip.weightless import weightless

TRACED = 2
"""Samples that are traced: batch norm refuses one alone."""


@dataclass(frozen=True)
class Cost:
    """What training one model takes, a sample at a time."""

    parameters: int
    """Trained numbers."""
    flops: int
    """Floating-point operations of a sample's forward and backward pass, in convolutions, products and attention, two
    a multiply-add, as a card's peak is counted; without what is frozen (CLIP's text tower)."""
    activations: int
    """Bytes that a sample's forward pass keeps for its backward pass, in float32."""

    def memory(self, micro: int, shards: int = 1) -> int:
        """Bytes of a worker that trains in float32 by micro-batches of that size and holds one of so many shards of the
        model, without PyTorch's own workspace and the blocks that are gathered for a moment."""
        return self.parameters * STATE_BYTES // shards + micro * self.activations


def parameters(kind: str, model: dict[str, Any]) -> int:
    """Trained numbers of a clip, a prior of either kind, a decoder or an upsampler of that (plain) configuration.

    Raises Refused for a configuration that the model refuses.
    """
    return _count(_built(kind, model))


def cost(kind: str, model: dict[str, Any], crop: int | None = None) -> Cost:
    """What training a model of that (plain) configuration costs.

    A forward and backward pass is traced on tensors that have shapes and no values. crop: side in pixels of
    what an upsampler is trained on, default the whole picture. Raises Refused for a configuration that it refuses.
    """
    from torch.utils.flop_counter import FlopCounterMode

    network = _built(kind, model).train()
    weights = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}  # by storage: what several operations keep is there once

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    fused = _Fused()
    with Weightless(), fused, FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = _FORWARD.get(kind, _pictures)(network, crop)
        output.sum().backward()
    flops = counter.get_total_flops() + fused.flops
    return Cost(_count(network), flops // TRACED, sum(kept.values()) // TRACED)


def _built(kind: str, model: dict[str, Any]) -> nn.Module:
    if kind != "clip":
        return shapes(kind, config_from(kind, model, kind))
    if model["vision_cfg"].get("timm_model_name"):  # timm reads numbers out of tensors while it builds
        with Weightless():
            return build(model).to("meta")
    with weightless():
        return build(model)


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _caption(config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A caption as CLIP reads it: embedding, token states and their mask."""
    seen = torch.ones(TRACED, config.context, dtype=torch.bool, device="meta")
    return _empty(config.embedding), _empty(config.context, config.text_width), seen


def _clip(network: nn.Module, crop: int | None) -> Tensor:
    clip = cast(Any, network)
    side = clip.visual.image_size
    height, width = (side, side) if isinstance(side, int) else side
    tokens = _integers(clip.context_length)
    return clip.encode_image(_empty(3, height, width)) + clip.encode_text(tokens)


def _prior(network: nn.Module, crop: int | None) -> Tensor:
    prior = cast(DiffusionPrior, network)
    return prior(_empty(prior.config.embedding), _integers(), *prior.context(*_caption(prior.config)))


def _ar_prior(network: nn.Module, crop: int | None) -> Tensor:
    prior = cast(AutoregressivePrior, network)
    tokens = _integers(prior.config.kept)
    return prior(tokens, *prior.context(*_caption(prior.config)))


def _decoder(network: nn.Module, crop: int | None) -> Tensor:
    decoder = cast(Decoder, network)
    config = decoder.config
    image = _empty(config.embedding) if config.image else None
    own = config.text == "own"
    caption = (_integers(config.context),) if own else _caption(config)
    context, picture = decoder.context(image, *caption), _picture(config.size)
    if config.inpaint:
        context = decoder.knowing(context, picture, torch.empty_like(picture[:, :1], dtype=torch.bool))
    return decoder(picture, _integers(), context)


def _upsampler(network: nn.Module, crop: int | None) -> Tensor:
    upsampler = cast(Upsampler, network)
    high = _picture(crop or upsampler.config.size)
    low = _picture(high.shape[-1] // upsampler.config.factor)
    # Not through its forward pass, which looks at t to choose between two networks of one size.
    return upsampler.unet(torch.cat([high, upsampler.enlarge(low)], 1), _integers())


def _pictures(network: nn.Module, crop: int | None) -> Tensor:
    """What is told a picture and its timestep alone: a noised classifier, a noised CLIP."""
    known = cast(Any, network)
    return known.encoder(_picture(known.config.size), _integers())


_FORWARD: dict[str, Callable[[nn.Module, int | None], Tensor]] = {
    "clip": _clip,
    "prior": _prior,
    "ar_prior": _ar_prior,
    "decoder": _decoder,
    "inpainter": _decoder,
    "upsampler": _upsampler,
}


def _empty(*shape: int) -> Tensor:
    return torch.empty(TRACED, *shape, device="meta")


def _picture(side: int) -> Tensor:
    return _empty(3, side, side)


def _integers(*shape: int) -> Tensor:
    return torch.empty(TRACED, *shape, dtype=torch.long, device="meta")


class _Fused(TorchFunctionMode):
    """Attention as a fused kernel does it, which keeps its inputs and its output; on the meta device PyTorch takes it
    apart, and would keep every weight of every token for every other one. `flops` counts forward and backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        pairs = q.shape[:-1].numel() * k.shape[-2]
        self.flops += 3 * 2 * pairs * (q.shape[-1] + v.shape[-1])
        return _Attention.apply(q, k, v)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
