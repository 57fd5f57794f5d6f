"""Our networks against diffusers' of the same weights: forward, forward and backward, and whole sampling.

Run with `make bench`. Each pair is timed in turn on the same inputs, one thread, both sides in each of their memory
layouts; the ratio is that of their best. Medians of interleaved repeats: machines differ and are noisy.
`UNCLIP_BENCH_COMPILE=1` adds torch.compile to both (minutes).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fixtures.plain import shaken
from unclip.decoder import Decoder, DecoderConfig
from unclip.interop_config import decoder_document, prior_document
from unclip.interop_layout import PRIOR, UNET
from unclip.prior import DiffusionPrior, PriorConfig

REPEATS = 5
SEEN = 24

DECODER = DecoderConfig(
    size=64, embedding=128, text_width=128, context=32, channels=64, multiples=(1, 2, 3, 4), depth=2,
    attention=(32, 16, 8), head_channels=64, context_width=128, learned_range=True,
)  # fmt: skip
"""Karlo's decoder, a fifth as wide and a block less deep: what two cores can time."""
PRIOR_CONFIG = PriorConfig(embedding=768, text_width=768, context=77, width=512, depth=6, heads=8)


def timed(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each call, one after another in rounds."""
    for call in calls.values():
        call()
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            took[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in took.items()}


def ratio(what: str, calls: dict[str, Callable[[], Any]]) -> float:
    """Time of the best of ours over that of the best of theirs; printed with all of them."""
    took = timed(calls)
    best = {side: min(t for name, t in took.items() if name.startswith(side)) for side in ("ours", "theirs")}
    found = best["ours"] / best["theirs"]
    rest = ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in took.items())
    print(f"\n{what}: {found:.2f} of diffusers' time ({rest})")
    return found


def variants(side: str, model: nn.Module) -> dict[str, nn.Module]:
    """The model as it is and with weights in channels-last order; compiled, too, if asked."""
    import copy

    found = {side: model}
    found[f"{side}, channels last"] = copy.deepcopy(model).to(memory_format=torch.channels_last)
    if os.environ.get("UNCLIP_BENCH_COMPILE"):
        found |= {f"{name}, compiled": torch.compile(variant) for name, variant in list(found.items())}
    return found


def theirs_unet(config: DecoderConfig, ours: Decoder) -> Any:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel.from_config(decoder_document(config))
    model.load_state_dict(UNET.theirs(ours.unet.state_dict()))
    return model


class Pair:
    """Our U-Net and diffusers' over the same context, as a decoder calls them."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        decoder = Decoder(DECODER)
        shaken(decoder.unet, 0)
        tokens = torch.randn(2, 4 + DECODER.context, DECODER.context_width).to(dtype)
        self.mask = torch.arange(4 + DECODER.context)[None].expand(2, -1) < SEEN
        self.x, self.t = torch.randn(2, 3, 64, 64).to(dtype), torch.tensor([30, 900])
        self.addend = torch.randn(2, DECODER.unet.time_width).to(dtype)
        self.tokens = tokens
        self.ours = variants("ours", decoder.unet.to(dtype))
        self.theirs = variants("theirs", theirs_unet(DECODER, decoder).to(dtype))

    def run_ours(self, unet: Any) -> Tensor:
        return unet(self.x, self.t, self.addend, unet.encode(self.tokens), self.mask)

    def run_theirs(self, unet: Any) -> Tensor:
        return unet(self.x, self.t, self.tokens, class_labels=self.addend, attention_mask=self.mask).sample

    def calls(self, then: Callable[[Tensor], Any]) -> dict[str, Callable[[], Any]]:
        found: dict[str, Callable[[], Any]] = {}
        for name, model in self.ours.items():
            found[name] = lambda m=model: then(self.run_ours(m))
        for name, model in self.theirs.items():
            found[name] = lambda m=model: then(self.run_theirs(m))
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_unet_is_not_slower_than_diffusers(dtype: torch.dtype) -> None:
    pair = Pair(dtype)
    with torch.no_grad():
        one, other = pair.run_ours(pair.ours["ours"]).float(), pair.run_theirs(pair.theirs["theirs"]).float()
        assert one.std() > 1e-3
        assert (one - other).abs().max() < (1e-4 if dtype == torch.float32 else 0.1) * one.abs().max()
        forward = ratio(f"U-Net forward, {dtype}", pair.calls(lambda out: None))
    both = ratio(f"U-Net forward and backward, {dtype}", pair.calls(lambda out: out.square().mean().backward()))
    assert forward <= 1.0
    assert both <= 1.0


def test_the_prior_is_not_slower_than_diffusers() -> None:
    from diffusers import PriorTransformer

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = replace(PRIOR_CONFIG, clip_range=None)
    ours = DiffusionPrior(config)
    theirs = PriorTransformer.from_config(prior_document(config))
    state = {name: value for name, value in ours.state_dict().items() if not name.startswith("null_text")}
    theirs.load_state_dict(PRIOR.theirs(state))
    z, t, text = torch.randn(4, 768), torch.tensor([5, 300, 600, 999]), torch.randn(4, 768)
    states, mask = torch.randn(4, 77, 768), torch.arange(77)[None].expand(4, -1) < SEEN
    with torch.no_grad():
        one, other = ours(z, t, text, states, mask), theirs(z, t, text, states, mask).predicted_image_embedding
        assert (one - other).abs().max() < 1e-4 * max(1.0, float(one.abs().max()))
        found = ratio(
            "prior forward",
            {
                "ours": lambda: ours(z, t, text, states, mask),
                "theirs": lambda: theirs(z, t, text, states, mask),
            },
        )
    assert found <= 1.0


def test_sampling_is_not_slower_than_diffusers() -> None:
    """Guided DDPM sampling of the decoder alone: our cached context against their loop, 10 steps, 2 pictures."""
    from diffusers import UnCLIPScheduler

    from unclip.guidance import classifier_free, clipped
    from unclip.samplers import ddpm, noise_for

    pair = Pair(torch.float32)
    decoder = Decoder(DECODER)
    decoder.unet.load_state_dict(pair.ours["ours"].state_dict())
    decoder.eval()
    theirs = pair.theirs["theirs"].eval()
    text = torch.randn(2, 128), torch.randn(2, 32, 128), torch.arange(32)[None].expand(2, -1) < SEEN
    image, noise = torch.randn(2, 128), noise_for([0, 1], (3, 64, 64))

    def sample_ours() -> Tensor:
        context, null = decoder.context(image, *text), decoder.null_context(2)
        denoise = clipped(classifier_free(decoder.denoise, context, null, 3.0), decoder.schedule)
        return ddpm(denoise, noise(0), decoder.schedule.respace(10), noise=noise)

    def sample_theirs() -> Tensor:
        scheduler = UnCLIPScheduler(variance_type="learned_range", clip_sample_range=1.0)
        scheduler.set_timesteps(10)
        x, tokens = noise(0), torch.cat([pair.tokens, pair.tokens])
        addend, mask = torch.cat([pair.addend, pair.addend]), torch.cat([pair.mask, pair.mask])
        for k, t in enumerate(scheduler.timesteps):
            out = theirs(torch.cat([x, x]), t, tokens, class_labels=addend, attention_mask=mask).sample
            null, wanted = out.chunk(2)
            mean = null[:, :3] + 3.0 * (wanted[:, :3] - null[:, :3])
            out = torch.cat([mean, wanted[:, 3:]], 1)
            before = scheduler.timesteps[k + 1] if k + 1 < len(scheduler.timesteps) else None
            x = scheduler.step(out, t, x, prev_timestep=before).prev_sample
        return x

    with torch.no_grad():
        assert ratio("guided sampling of the decoder, 10 steps", {"ours": sample_ours, "theirs": sample_theirs}) <= 1.0
