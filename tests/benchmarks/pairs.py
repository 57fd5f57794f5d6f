"""The same weights on both sides: our U-Net, prior and cascade, and diffusers' of the same shape.

    python -m tests.benchmarks.pairs unet-forward|unet-training|prior|sampling ours|theirs float32|bfloat16

prints the bytes that one call takes at its peak.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.measure import Call, one_thread, peak_bytes
from tests.fixtures.plain import shaken
from unclip.cascade import UnCLIP
from unclip.clip.model import Clip, Preprocess, build_clip
from unclip.diffusion.samplers import noise_for
from unclip.diffusion.settings import Sampling
from unclip.interop.config import decoder_document, prior_document
from unclip.interop.diffusers import export_diffusers
from unclip.interop.layout import PRIOR, UNET
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.layers import fold_upsampling
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig

SEEN = 24
"""Tokens of a caption that are no padding."""

DECODER = DecoderConfig(
    size=64, embedding=128, text_width=128, context=32, channels=64, multiples=(1, 2, 3, 4), depth=2,
    attention=(32, 16, 8), head_channels=64, context_width=128, learned_range=True,
)  # fmt: skip
"""Karlo's decoder, a fifth as wide and a block less deep: what one core can time."""
PRIOR_CONFIG = PriorConfig(embedding=768, text_width=768, context=77, width=512, depth=6, heads=8)
"""Karlo's prior over the same sequence, a quarter as wide and less deep."""

WIDTH, CONTEXT, SMALL, LARGE = 128, 77, 32, 128
CLIP = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 2000, "width": WIDTH, "heads": 2, "layers": 6},
}
PROMPTS = ["a large red circle", "hello world, it's a blue square on a white background"]
SEEDS = [3, 4]
STEPS = {"prior": 25, "decoder": 25, "upsampler-128": 7}
"""As UnCLIPPipeline takes by default."""
SCALES = {"prior": 4.0, "decoder": 8.0}


def laid_out(make: Callable[[], nn.Module], *, fold: bool = False) -> dict[str, Any]:
    """The network with contiguous weights and in channels-last order; compiled, too, if the environment asks for it."""
    found: dict[str, Any] = {"contiguous": make(), "channels last": make().to(memory_format=torch.channels_last)}
    if fold:
        for network in list(found.values()):
            fold_upsampling(network)
    if os.environ.get("UNCLIP_BENCH_COMPILE"):
        found |= {f"{name}, compiled": torch.compile(network) for name, network in list(found.items())}
    return found


class UNets:
    """Our U-Net and diffusers' over the same context, as a decoder calls them: two pictures of 64 px."""

    def __init__(self, dtype: torch.dtype) -> None:
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        decoder = Decoder(DECODER)
        shaken(decoder.unet, 0)
        self.tokens = torch.randn(2, 4 + DECODER.context, DECODER.context_width).to(dtype)
        self.mask = torch.arange(4 + DECODER.context)[None].expand(2, -1) < SEEN
        self.x, self.t = torch.randn(2, 3, 64, 64).to(dtype), torch.tensor([30, 900])
        self.addend = torch.randn(2, DECODER.unet.time_width).to(dtype)
        self.mine = decoder.unet.to(dtype)
        self.other = UNet2DConditionModel.from_config(decoder_document(DECODER))
        self.other.load_state_dict(UNET.theirs(decoder.unet.state_dict()))
        self.other.to(dtype)

    def run_ours(self, unet: Any) -> Tensor:
        return unet(self.x, self.t, self.addend, unet.encode(self.tokens), self.mask)

    def run_theirs(self, unet: Any) -> Tensor:
        return unet(self.x, self.t, self.tokens, class_labels=self.addend, attention_mask=self.mask).sample

    def ours(self, then: Callable[[Tensor], Any], *, fold: bool = True) -> dict[str, Call]:
        variants = laid_out(lambda: copy.deepcopy(self.mine), fold=fold)
        return {name: lambda m=model: then(self.run_ours(m)) for name, model in variants.items()}

    def theirs(self, then: Callable[[Tensor], Any]) -> dict[str, Call]:
        variants = laid_out(lambda: copy.deepcopy(self.other))
        return {name: lambda m=model: then(self.run_theirs(m)) for name, model in variants.items()}


class Priors:
    """Our prior and PriorTransformer: four embeddings, each after a caption of 77 tokens."""

    def __init__(self, dtype: torch.dtype) -> None:
        from diffusers import PriorTransformer

        torch.manual_seed(0)
        self.mine = DiffusionPrior(PRIOR_CONFIG)
        self.other = PriorTransformer.from_config(prior_document(PRIOR_CONFIG))
        state = {name: value for name, value in self.mine.state_dict().items() if not name.startswith("null_text")}
        self.other.load_state_dict(PRIOR.theirs(state))
        self.mine.to(dtype), self.other.to(dtype)
        self.z, self.t = torch.randn(4, 768).to(dtype), torch.tensor([5, 300, 600, 999])
        text = torch.randn(4, 768).to(dtype), torch.randn(4, 77, 768).to(dtype)
        self.context = *text, torch.arange(77)[None].expand(4, -1) < SEEN

    def run_ours(self, prior: Any) -> Tensor:
        return prior(self.z, self.t, *self.context)

    def run_theirs(self, prior: Any) -> Tensor:
        return prior(self.z, self.t, *self.context).predicted_image_embedding


class Cascades:
    """Prior, decoder and one upsampler in Karlo's proportions, 32 px and 128 px, and the pipeline made by export."""

    def __init__(self, folder: Path) -> None:
        from diffusers.pipelines.deprecated import unclip
        from diffusers.utils import logging

        logging.set_verbosity_error()
        torch.manual_seed(0)
        clip = Clip.of(shaken(build_clip(CLIP), 1), CLIP, Preprocess(32, resize="squash"))
        widths = {"embedding": WIDTH, "text_width": WIDTH, "context": CONTEXT}
        prior = DiffusionPrior(PriorConfig(**widths, width=512, depth=6, heads=8, clip_range=5.0))
        decoder = Decoder(
            DecoderConfig(
                **widths, size=SMALL, channels=64, multiples=(1, 2, 3, 4), depth=2, attention=(16, 8, 4),
                head_channels=64, context_width=256, learned_range=True,
            )
        )  # fmt: skip
        upsampler = Upsampler(
            UpsamplerConfig(
                low=SMALL, size=LARGE, channels=32, multiples=(1, 2, 3, 4), depth=2, scale_shift=False, antialias=True
            )
        )
        for seed, model in enumerate((prior, decoder, upsampler), start=2):
            shaken(model, seed)
        for model in (prior, decoder):
            model.null_text.set(*(part[0] for part in clip.encode_text([""])))
        self.mine = UnCLIP(clip, prior, decoder, [upsampler], tile=len(PROMPTS))
        export_diffusers(self.mine, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.other = unclip.UnCLIPPipeline.from_pretrained(folder)
        self.other.set_progress_bar_config(disable=True)
        shapes = {"prior/0": (WIDTH,), "decoder": (3, SMALL, SMALL), "upsampler-128": (3, LARGE, LARGE)}
        self.steps, self.scales = STEPS, SCALES
        self.noises = {name: noise_for(SEEDS, shape, stream=name) for name, shape in shapes.items()}

    def layout(self, layout: torch.memory_format) -> None:
        """Both sides' U-Nets in this order."""
        pipe = self.other
        for network in (self.mine.decoder, *self.mine.upsamplers):
            network.to(memory_format=layout)
        for network in (pipe.decoder, pipe.super_res_first, pipe.super_res_last):
            network.to(memory_format=layout)

    def run_ours(self) -> Tensor:
        """uint8 [2, 3, 128, 128]."""
        scales = {"upsampler-128": 1.0} | self.scales
        sampling = {name: Sampling("ddpm", steps, guidance=scales[name]) for name, steps in self.steps.items()}
        return self.mine.generate(PROMPTS, seeds=SEEDS, sampling=sampling)

    def run_theirs(self) -> Tensor:
        """The same of UnCLIPPipeline, from the same noise."""
        from diffusers.schedulers import scheduling_unclip

        due = [(name, k) for name, s in zip(self.noises, self.steps.values(), strict=True) for k in range(1, s)]
        drawn, scheduling_unclip.randn_tensor = scheduling_unclip.randn_tensor, lambda *_, **__: self._noise(due)
        try:
            made = self.other(
                PROMPTS,
                prior_num_inference_steps=self.steps["prior"],
                decoder_num_inference_steps=self.steps["decoder"],
                super_res_num_inference_steps=self.steps["upsampler-128"],
                prior_latents=self.noises["prior/0"](0),
                decoder_latents=self.noises["decoder"](0),
                super_res_latents=self.noises["upsampler-128"](0),
                prior_guidance_scale=self.scales["prior"],
                decoder_guidance_scale=self.scales["decoder"],
                output_type="np",
            ).images
        finally:
            scheduling_unclip.randn_tensor = drawn
        assert not due
        return (torch.from_numpy(made).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)

    def _noise(self, due: list[tuple[str, int]]) -> Tensor:
        name, k = due.pop(0)
        return self.noises[name](k)


def backward(out: Tensor) -> None:
    """What a training step does with the output."""
    out.float().square().mean().backward()


def main() -> None:
    """One side's peak memory, in a process that has done nothing else."""
    what, side, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
    one_thread()
    with tempfile.TemporaryDirectory() as folder, torch.set_grad_enabled(what == "unet-training"):
        if what == "sampling":
            found: Any = Cascades(Path(folder) / "diffusers")
            print(peak_bytes(found.run_ours if side == "ours" else found.run_theirs))
            return
        found = Priors(dtype) if what == "prior" else UNets(dtype)
        network = found.mine if side == "ours" else found.other
        run = found.run_ours if side == "ours" else found.run_theirs
        if what != "prior":
            network.to(memory_format=torch.channels_last)
            fold_upsampling(network)

        def call() -> None:
            out = run(network)
            if what == "unet-training":
                backward(out)
                network.zero_grad(set_to_none=True)

        print(peak_bytes(call))


if __name__ == "__main__":
    main()
