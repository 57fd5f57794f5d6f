"""Networks on a GPU: pictures a second, TFLOP/s, and the share of the matmul peak that was measured on the same card.

    python -m tests.gpu.bench_models [--device cuda] [--batch 32] [--models karlo,base] [--steps 20]

Needs torch alone; where diffusers is installed, its network of the same shape follows each of ours, compiled alike.
Each network is trained (forward and backward, no optimiser) in bfloat16 with channels-last weights and torch.compile,
as a fit on one card would; attention is torch's scaled_dot_product_attention. FLOPs are those of matrix products and
convolutions, as torch counts them. Prints one line of JSON a network.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unclip.models.decoder import IMAGE_TOKENS, Decoder, DecoderConfig
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.presets import preset

TINY = {
    "decoder": DecoderConfig(
        size=16, embedding=64, text_width=64, context=8, channels=32, multiples=(1, 2), depth=1, attention=(8,),
        head_channels=32, context_width=64, learned_range=True,
    ),
    "prior": PriorConfig(embedding=64, text_width=64, context=8, width=64, depth=1, heads=2),
}  # fmt: skip
"""What a machine without a GPU can run, to see that this file works."""


def seconds(call: Callable[[], Any], device: torch.device, steps: int) -> float:
    """Seconds of one call, after three that warm up (and compile)."""
    for _ in range(3):
        call()
    _wait(device)
    began = time.perf_counter()
    for _ in range(steps):
        call()
    _wait(device)
    return (time.perf_counter() - began) / steps


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of the fastest of some large square products: what this card gives in practice."""
    sides = (4096, 8192, 16384) if device.type == "cuda" else (512,)
    found = 0.0
    for side in sides:
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        took = seconds(lambda a=a, b=b: a @ b, device, 10)
        found = max(found, 2 * side**3 / took / 1e12)
    return found


def flops(call: Callable[[], Any]) -> int:
    """FLOPs of one call's matrix products and convolutions, eager."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def training(network: Callable[..., Any], model: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
    """One forward and backward."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        out = network(*inputs)
        out = out if isinstance(out, Tensor) else out[0]  # diffusers answers with a record of one tensor
        out.float().square().mean().backward()

    return step


class Conditioned(nn.Module):
    """A decoder as it is trained: what it is told is encoded in every step."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor, t: Tensor, *told: Tensor) -> Tensor:
        return self.decoder(x, t, self.decoder.context(*told))


def cases(
    name: str, tiny: bool, batch: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Any, Any]]:
    """(what, model, inputs of its forward) of a row of the table."""
    row, diffusers = preset(name), importlib.util.find_spec("diffusers") is not None
    decoder_config: DecoderConfig = TINY["decoder"] if tiny else replace(row.decoder, dropout=0.0)  # type: ignore[assignment]
    prior_config: PriorConfig = TINY["prior"] if tiny else row.prior  # type: ignore[assignment]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    t = torch.randint(1000, (batch,), device=device)
    decoder = Decoder(decoder_config).to(device, dtype).to(memory_format=torch.channels_last)
    c = decoder_config
    x = draw(batch, 3, c.size, c.size).to(memory_format=torch.channels_last)
    mask = torch.ones(batch, c.context, dtype=torch.bool, device=device)
    words = draw(batch, c.embedding), draw(batch, c.embedding), draw(batch, c.context, c.text_width)
    yield "decoder", Conditioned(decoder), (x, t, *words, mask)
    del decoder
    if diffusers:
        theirs = _theirs_unet(decoder_config).to(device, dtype).to(memory_format=torch.channels_last)
        tokens = draw(batch, IMAGE_TOKENS + c.context, c.context_width)
        seen = nn.functional.pad(mask, (IMAGE_TOKENS, 0), value=True)
        yield "decoder of diffusers", theirs, (x, t, tokens, draw(batch, c.unet.time_width), None, seen)
        del theirs
    prior, p = DiffusionPrior(prior_config).to(device, dtype), prior_config
    seen = torch.ones(batch, p.context, dtype=torch.bool, device=device)
    caption = draw(batch, p.embedding), draw(batch, p.context, p.text_width)
    z = draw(batch, p.embedding)
    yield "prior", prior, (z, t, *caption, seen)
    del prior
    if diffusers:
        yield "prior of diffusers", _theirs_prior(prior_config).to(device, dtype), (z, t, *caption, seen)


def _theirs_unet(config: DecoderConfig) -> nn.Module:
    from diffusers import UNet2DConditionModel

    from unclip.interop.config import decoder_document

    return UNet2DConditionModel.from_config(decoder_document(config))


def _theirs_prior(config: PriorConfig) -> nn.Module:
    from diffusers import PriorTransformer

    from unclip.interop.config import prior_document

    return PriorTransformer.from_config(prior_document(config))


def measured(
    network: nn.Module, inputs: tuple[Any, ...], steps: int, device: torch.device, *, compiled: bool
) -> tuple[float, int]:
    """(seconds a step, FLOPs a step)."""
    counted = flops(training(network, network, inputs))
    run = torch.compile(network) if compiled else network
    return seconds(training(run, network, inputs), device, steps), counted


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Prints a line of JSON for the card, then one for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--models", default="karlo,base")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="networks that a CPU can run, to try this file")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    asked = parser.parse_args()
    device, dtype = torch.device(asked.device), torch.bfloat16
    torch.manual_seed(0)
    best = peak(device, dtype)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(json.dumps({"device": card, "torch": torch.__version__, "matmul_tflops": round(best, 2)}), flush=True)
    for name in asked.models.split(","):
        for what, model, inputs in cases(name, asked.tiny, asked.batch, device, dtype):
            took, counted = measured(model, inputs, asked.steps, device, compiled=not asked.eager)
            line = {
                "model": f"{name} {what}",
                "batch": asked.batch,
                "pictures_per_s": round(asked.batch / took, 2),
                "tflops": round(counted / took / 1e12, 3),
                "share_of_peak": round(counted / took / 1e12 / best, 3),
            }
            if device.type == "cuda":
                line["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
                torch.cuda.reset_peak_memory_stats(device)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
