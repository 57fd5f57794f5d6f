"""What a model costs, from its configuration alone: parameters, operations and memory. No weight is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from training.meta import Weightless, shapes
from training.options import KINDS, named
from training.parallel import STATE_BYTES, recomputed
from unclip.clip import TextTower, build_clip, foreign_settings, foreign_vision_settings, image_tower
from unclip.meta import weightless
from unclip.models import AutoregressivePrior, Decoder, DiffusionPrior, Upsampler
from unclip.release import config_from

HALF_BYTES = 2
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
    """Bytes that a sample's forward pass keeps for its backward pass; of blocks that are recomputed, what goes into
    them, and what the largest of them keeps while it is computed again."""
    again: int = 0
    """Operations of what is computed a second time for a sample's backward pass, which `flops` does not count."""
    copies: int = 0
    """Bytes that are kept whatever the number of samples: under autocast, the weights in half precision."""

    def memory(self, micro: int, shards: int = 1) -> int:
        """Bytes of a worker that trains by micro-batches of that size and holds one of so many shards of the model,
        without PyTorch's own workspace and the blocks that are gathered for a moment."""
        return self.parameters * STATE_BYTES // shards + self.copies + micro * self.activations


def parameters(kind: str, model: dict[str, Any]) -> int:
    """Trained numbers of a clip, a prior of either kind, a decoder or an upsampler of that (plain) configuration.

    Raises Refused for a configuration that the model refuses.
    """
    return _count(_built(kind, model))


def cost(
    kind: str,
    model: dict[str, Any],
    crop: int | None = None,
    *,
    precision: str = "float32",
    recompute: bool = False,
    gpu: bool = False,
) -> Cost:
    """What training a model of that (plain) configuration costs.

    A forward and backward pass is traced on tensors that have shapes and no values. crop: side in pixels of
    what an upsampler is trained on, default the whole picture. precision: what autocast computes in; gpu: by its rules
    for a GPU, where norms are computed in float32, or for a CPU. recompute: as in `FitHow`. Raises Refused for a
    configuration that it refuses.
    """
    network = _built(kind, model).train()
    count, forward = _count(network), partial(named(KINDS[kind].forward), network, crop)
    if precision == "float32":
        found = _traced(network, forward, TRACED, recompute)
        return Cost(count, found.flops // TRACED, found.kept // TRACED, found.again // TRACED)
    with _faked(network), torch.autocast("cpu", getattr(torch, precision)):
        found, more = (_traced(network, forward, samples, recompute, gpu) for samples in (TRACED, 2 * TRACED))
    each = (more.kept - found.kept) // TRACED  # without what is kept once, as autocast's copies of the weights
    return Cost(count, found.flops // TRACED, each, found.again // TRACED, HALF_BYTES * count)


def _built(kind: str, model: dict[str, Any]) -> nn.Module:
    if kind != "clip":
        return shapes(kind, config_from(kind, model, kind))
    if not foreign_settings(model) and not foreign_vision_settings(model):
        with weightless():
            return _Towers(model)
    if model["vision_cfg"].get("timm_model_name"):  # timm reads numbers out of tensors while it builds
        with Weightless():
            return build_clip(model).to("meta")
    with weightless():
        return build_clip(model)


class _Towers(nn.Module):
    """A CLIP of our own towers, to be counted: open_clip's takes seconds to import."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        self.visual, self.text = image_tower(model), TextTower(model)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        if "init_logit_bias" in model:
            self.logit_bias = nn.Parameter(torch.zeros(()))
        self.visual.image_size = model["vision_cfg"].get("image_size", 224)
        self.context_length = len(self.text.positional_embedding)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.visual(pixels)

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.text(ids).embedding


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@dataclass(frozen=True)
class Given:
    """What a forward pass is traced on: tensors of so many samples, on the device on which the model's are."""

    samples: int
    device: torch.device

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(self.samples, *shape, device=self.device)

    def integers(self, *shape: int) -> Tensor:
        return torch.empty(self.samples, *shape, dtype=torch.long, device=self.device)

    def picture(self, side: int) -> Tensor:
        return self.floats(3, side, side)

    def caption(self, config: Any) -> tuple[Tensor, Tensor, Tensor]:
        """As CLIP reads it: embedding, token states and their mask."""
        seen = torch.empty(self.samples, config.context, dtype=torch.bool, device=self.device).fill_(True)
        return self.floats(config.embedding), self.floats(config.context, config.text_width), seen


def pass_clip(network: nn.Module, crop: int | None, given: Given) -> Tensor:
    """Both towers of a CLIP."""
    clip = cast(Any, network)
    side = clip.visual.image_size
    height, width = (side, side) if isinstance(side, int) else side
    return clip.encode_image(given.floats(3, height, width)) + clip.encode_text(given.integers(clip.context_length))


def pass_prior(network: nn.Module, crop: int | None, given: Given) -> Tensor:
    """A diffusion prior."""
    prior = cast(DiffusionPrior, network)
    return prior(given.floats(prior.config.embedding), given.integers(), *prior.context(*given.caption(prior.config)))


def pass_ar_prior(network: nn.Module, crop: int | None, given: Given) -> Tensor:
    """An autoregressive prior."""
    prior = cast(AutoregressivePrior, network)
    return prior(given.integers(prior.config.kept), *prior.context(*given.caption(prior.config)))


def pass_decoder(network: nn.Module, crop: int | None, given: Given) -> Tensor:
    """A decoder, or an inpainter."""
    decoder = cast(Decoder, network)
    config = decoder.config
    image = given.floats(config.embedding) if config.image else None
    caption = (given.integers(config.context),) if config.text == "own" else given.caption(config)
    context, picture = decoder.context(image, *caption), given.picture(config.size)
    if config.inpaint:
        context = decoder.knowing(context, picture, torch.empty_like(picture[:, :1], dtype=torch.bool))
    return decoder(picture, given.integers(), context)


def pass_upsampler(network: nn.Module, crop: int | None, given: Given) -> Tensor:
    """An upsampler."""
    upsampler = cast(Upsampler, network)
    high = given.picture(crop or upsampler.config.size)
    low = given.picture(high.shape[-1] // upsampler.config.factor)
    # Not through its forward pass, which looks at t to choose between two networks of one size.
    return upsampler.unet(torch.cat([high, upsampler.enlarge(low)], 1), given.integers())


def pass_encoder(network: nn.Module, crop: int | None, given: Given) -> Tensor:
    """What is told a picture and its timestep alone: a noised classifier, a noised CLIP."""
    known = cast(Any, network)
    return known.encoder(given.picture(known.config.size), given.integers())


@dataclass(frozen=True)
class _Found:
    """What a pass of some samples took."""

    flops: int
    again: int
    kept: int


def _traced(
    network: nn.Module, forward: Callable[[Given], Tensor], samples: int, recompute: bool, gpu: bool = False
) -> _Found:
    """One forward and backward pass of so many samples; gpu: autocast's rules for one."""
    from torch.utils.flop_counter import FlopCounterMode

    given, fused = Given(samples, next(network.parameters()).device), _Fused(norms_in_float32=gpu)
    counter = FlopCounterMode(display=False)
    kept = _Kept(network, lambda: counter.get_total_flops() + fused.forward_flops)
    weightless = Weightless() if given.device.type == "meta" else nullcontext()
    with weightless, fused, counter, kept.recomputed(network if recompute else nn.Module()):
        with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
            output = forward(given)
        with torch.autocast("cpu", enabled=False):
            output.sum().backward()
    network.zero_grad()
    return _Found(counter.get_total_flops() + 3 * fused.forward_flops, kept.again, kept.bytes)


class _Kept:
    """What a forward pass keeps for the backward pass, by storage: what several operations keep is there once."""

    def __init__(self, network: nn.Module, flops: Callable[[], int]) -> None:
        self._weights = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
        self._flops, self._now, self._depth = flops, dict[int, int](), 0
        self.largest = 0
        """Bytes that a block keeps while it is computed again, at most."""
        self.again = 0
        """Operations of what is computed again."""

    @property
    def bytes(self) -> int:
        """At their most."""
        return sum(self._now.values()) + self.largest

    def keep(self, tensor: Tensor) -> Tensor:
        """Autograd's hook for each tensor that is saved."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights:
            self._now[storage._cdata] = storage.nbytes()
        return tensor

    @contextmanager
    def recomputed(self, network: nn.Module) -> Iterator[None]:
        """Inside it, the network's blocks keep what they are given alone, as `modes.recompute` has them."""
        blocks = list(recomputed(network))
        for block in blocks:
            block.forward = partial(self._block, block.forward)
        yield
        for block in blocks:
            del block.forward  # the method of its class again

    def _block(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, Tensor):
                self.keep(tensor)
        outside, self._now, before = self._now, {}, self._flops()
        self._depth += 1
        try:
            return forward(*args, **kwargs)
        finally:
            self._depth -= 1
            self.again += self._flops() - before if self._depth == 0 else 0
            inside = sum(size for storage, size in self._now.items() if storage not in outside)
            self.largest, self._now = max(self.largest, inside), outside


@contextmanager
def _faked(network: nn.Module) -> Iterator[None]:
    """Inside it, the tensors of a network on the meta device, and new ones, say that they are a CPU's, and have no
    values either: autocast does not know the meta device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        made: dict[int, Tensor] = {}
        for module in network.modules():
            for own in (module._parameters, module._buffers):
                for name, tensor in own.items():
                    if tensor is not None:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                        like = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
                        own[name] = made.setdefault(id(tensor), like)  # type: ignore[assignment]
        yield


class _Fused(TorchFunctionMode):
    """Attention as a fused kernel does it, which keeps its inputs and its output; on the meta device PyTorch takes it
    apart, and would keep every weight of every token for every other one. `forward_flops` counts its forward pass; the
    backward pass takes twice as many.

    norms_in_float32: what autocast does on a GPU, and not on a CPU.
    """

    def __init__(self, *, norms_in_float32: bool) -> None:
        super().__init__()
        self.forward_flops = 0
        self._norms = (F.group_norm, F.layer_norm) if norms_in_float32 else ()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._norms:
            args = (args[0].float(), *args[1:])
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        pairs = q.shape[:-1].numel() * k.shape[-2]
        self.forward_flops += 2 * pairs * (q.shape[-1] + v.shape[-1])
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
