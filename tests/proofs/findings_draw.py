"""What the findings measure, one cell after another: draw with one setting, read the pictures back, keep both.

All cells of a kind draw the same prompts with the same seeds, so the same x_T, and where the prior is the same, the
same z_i: what differs between two cells is the setting alone. The decoder's own pictures are judged, before any
upsampler, which sees neither caption nor z_i.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from infra.records.folders import materialise
from infra.records.manifest import Manifest
from infra.records.objects import object_name
from infra.store.local import LocalStore
from pipelines.embed.stage import base_picture
from pipelines.evaluate.grids import pixels
from pipelines.release.open import open_release
from pipelines.shapes import oracle
from tests.proofs.findings_cells import DEMO, AnyCell, Bits, Cell, Cost, Enlarged, Words
from tests.proofs.findings_fits import VARIANTS, Variant, counted, fitted, planned, step_flops
from tests.proofs.findings_scenes import Asked, asked, caption_swapped
from unclip.cascade import UnCLIP, to_uint8
from unclip.clip.text import Text
from unclip.degrade.bsr import gaussian_blur
from unclip.diffusion.guidance import conditional
from unclip.diffusion.losses import bits_per_dim
from unclip.diffusion.samplers import SAMPLERS, noise_for
from unclip.diffusion.settings import Sampling, clip_denoiser, guided_denoiser
from unclip.files import read_json, read_tensors
from unclip.metrics import cosine
from unclip.models.decoder import Context, Decoder
from unclip.models.upsampler import Upsampler
from unclip.release.model import load_model

TILE = 64
REFERENCE, SOURCE, SECOND = 0, 1, 2
"""Seeds of true pictures: to compare with, to take a true z_i from, and to see how near true pictures come."""
BLUR = 0.6
"""σ of a blurred condition, in its pixels: the strongest that the demo's upsamplers were trained on."""
BOUND_PICTURES = 64


class Bench:
    """A demo's release and the variants beside it, in one process."""

    def __init__(self, store: LocalStore, release: str, out: Path) -> None:
        self.store, self.out = store, out
        self.folder = open_release(store, release)
        self.demo = UnCLIP.load(self.folder)
        self.clip = self.demo.clip
        self._models: dict[str, Any] = {DEMO: None}
        self._truth: dict[Any, NDArray[np.uint8]] = {}

    def run(self, cell: AnyCell) -> dict[str, Any]:
        """Does a cell, keeps its pictures and embeddings in a file, and returns its line."""
        started = time.perf_counter()
        kinds: dict[type, Any] = {
            Cell: self._drawn,
            Enlarged: self._enlarged,
            Bits: self._bits,
            Words: self._words,
            Cost: self._cost,
        }
        found = kinds[type(cell)](cell)
        return {"name": cell.name, "cell": asdict(cell), "seconds": round(time.perf_counter() - started, 1), **found}

    def truth(self, scenes: str, count: int, seed: int) -> None:
        """Keeps true pictures of the decoder's size, their embeddings, z_i as the priors learned it, and z_t."""
        name = f"true,scenes={scenes},seed={seed}"
        if not (self.out / f"{name}.npz").exists():
            full = self._true(scenes, count, seed, 128)
            small = resized(full, self.demo.decoder.config.size)
            text = self.clip.encode_text([one.prompt for one in asked(scenes, count)]).embedding.numpy()
            self._save(name, small, z=self._embeddings(full), text=text)

    # Drawing --------------------------------------------------------------------------------------------------------

    def _drawn(self, cell: Cell) -> dict[str, Any]:
        asked_for = asked(cell.scenes, cell.count)
        parts, embeddings = [], []
        for rows in _tiles(cell.count):
            text = self.clip.encode_text([asked_for[row].prompt for row in rows])
            z = self._z(cell, text, rows)
            parts.append(shown(self._decode(cell, z, text, rows)))
            embeddings.append(z)
        pictures = np.concatenate(parts)
        self._save(cell.name, pictures, z=torch.cat(embeddings).numpy())
        return read_back(pictures, asked_for)

    def _z(self, cell: Cell, text: Text, rows: list[int]) -> Tensor:
        decoder, z = self.demo.decoder, text.embedding
        if cell.embedding in ("text", "none"):
            return z
        if cell.embedding == "text-length":
            return z * self._statistics["image_length"] / z.norm(dim=1, keepdim=True)
        if cell.embedding == "text-moved":
            return (z - self._statistics["text_mean"]) / self._statistics["text_std"] * decoder.std + decoder.mean
        if cell.embedding == "true":
            pictures = self._true(cell.scenes, cell.count, SOURCE, 128)[rows]
            return torch.from_numpy(self._embeddings(pictures))
        sampling = replace(self.demo.sampling["prior"], guidance=cell.prior_guidance)
        if cell.embedding == DEMO:
            return self.demo.sample_prior(text, rows, sampling)
        cascade = UnCLIP(self.clip, self._model(cell.embedding, "prior", "ar_prior"), decoder, ())
        return cascade.sample_prior(text, rows, sampling)

    @torch.no_grad()
    def _decode(self, cell: Cell, z: Tensor, text: Text, seeds: list[int]) -> Tensor:
        """As `UnCLIP.sample_decoder`, with either half of condition and null dropped as the cell says."""
        decoder = self._decoder(cell.decoder)

        def context(image: bool, caption: bool) -> Context:
            drop_image, drop_text = (torch.full((len(z),), not kept) for kept in (image, caption))
            return decoder.context(z, *text, drop_image=drop_image, drop_text=drop_text)

        sampling = Sampling(cell.sampler, cell.steps, cell.guidance, variance=cell.variance)
        condition = context(cell.embedding != "none", cell.caption)
        null = context(cell.against == "image", False)
        denoise = guided_denoiser(decoder.denoise, condition, null, sampling, decoder.schedule)
        denoise = clip_denoiser(denoise, sampling, decoder.schedule)
        side = decoder.config.size
        noise = noise_for(seeds, (3, side, side), stream="decoder")
        schedule, options = decoder.schedule.respace(cell.steps), sampling.options(pictures=True)
        return SAMPLERS[cell.sampler](denoise, noise(0), schedule, noise=noise, **options)

    def _enlarged(self, cell: Enlarged) -> dict[str, Any]:
        asked_for = asked("single", cell.count)
        upsampler: Upsampler = self._model(cell.upsampler, "upsampler") or self.demo.upsamplers[0]
        side = upsampler.config.size
        true = resized(self._true("single", cell.count, REFERENCE, 128), side)
        if cell.condition == "drawn":
            low = unit(np.load(self.out / f"{Cell(count=cell.count).name}.npz")["pictures"])
        else:
            low = F.avg_pool2d(unit(true), upsampler.config.factor)
            if cell.condition == "blurred":
                low = gaussian_blur(low, torch.full((cell.count,), BLUR))
        sampling = self.demo.sampling[f"upsampler-{side}"]
        parts = [shown(self.demo.sample_upsampler(upsampler, low[rows], rows, sampling)) for rows in _tiles(cell.count)]
        pictures = np.concatenate(parts)
        self._save(cell.name, pictures)
        found = read_back(pictures, asked_for)
        if cell.condition != "drawn":
            error = (pictures / 255.0 - true / 255.0) ** 2
            found["psnr"] = (-10 * np.log10(error.mean((1, 2, 3)))).round(3).tolist()
        return found

    # Measuring ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _bits(self, cell: Bits) -> dict[str, Any]:
        decoder, side = self._decoder(cell.decoder), self.demo.decoder.config.size
        full = self._true("single", BOUND_PICTURES, REFERENCE, 128)
        text = self.clip.encode_text([one.prompt for one in asked("single", BOUND_PICTURES)])
        context = decoder.context(torch.from_numpy(self._embeddings(full)), *text)
        noise = noise_for(range(BOUND_PICTURES), (3, side, side), stream="bound")
        schedule, x0 = decoder.schedule.respace(cell.steps), unit(resized(full, side))
        bound = bits_per_dim(conditional(decoder.denoise, context), schedule, x0, noise, cell.variance)
        return {"bits": bound.total.tolist()}

    def _words(self, cell: Words) -> dict[str, Any]:
        asked_for = asked("pair", cell.count)
        image = self._embeddings(self._true("pair", cell.count, REFERENCE, 128))

        def likeness(texts: list[str]) -> NDArray[np.float64]:
            return cosine(image, self.clip.encode_text(texts).embedding.numpy())

        own = likeness([one.prompt for one in asked_for])
        swapped = {
            what: likeness([caption_swapped(one, what) for one in asked_for]) for what in ("colours", "relation")
        }
        return {what: (own > other).tolist() for what, other in swapped.items()}

    def _cost(self, cell: Cost) -> dict[str, Any]:
        plan = planned(self.store, self.folder, VARIANTS.get(cell.prior, Variant("prior")))
        rows = list(range(TILE))
        text = self.clip.encode_text([one.prompt for one in asked("single", TILE)])
        self._model(cell.prior, "prior", "ar_prior")  # what it takes to read it is not counted
        with counted() as counter:
            self._z(Cell(embedding=cell.prior), text, rows)
        steps = plan.train["steps"]
        return {
            "steps": steps,
            "training": steps * step_flops(self.store, plan),
            "drawing": counter.get_total_flops() / TILE,
        }

    def _embeddings(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Raw CLIP image embeddings [n, d] of uint8 [n, h, w, 3]."""
        tensor = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
        return torch.cat([self.clip.encode_images(part) for part in tensor.split(TILE)]).numpy()

    @cached_property
    def _statistics(self) -> dict[str, Tensor]:
        """Of the training data: the text embeddings' mean and deviation, and the length of an image embedding."""
        data = read_json(self.folder / "decoder" / "config.json", "decoder")["facts"]["data"]
        record = Manifest.load(self.store, data["statistics"]).only
        tensors = read_tensors(self.store.local(object_name(record.sha("statistics.safetensors"))))
        # E|z|² is the squared length of the mean and the variances together.
        length = (tensors["image_mean"].square().sum() + tensors["image_std"].square().sum()).sqrt()
        return tensors | {"image_length": length}

    # Models and pictures --------------------------------------------------------------------------------------------

    def _decoder(self, name: str) -> Decoder:
        found: Decoder = self._model(name, "decoder") or self.demo.decoder
        return found

    def _model(self, name: str, *kinds: str) -> Any:
        """A variant by name, or None for the demo's own."""
        if name not in self._models:
            record = fitted(self.store, self.folder, name)
            with tempfile.TemporaryDirectory(prefix="findings-") as folder:
                self._models[name] = load_model(materialise(self.store, record, Path(folder) / name), *kinds)
        return self._models[name]

    def _true(self, scenes: str, count: int, seed: int, side: int) -> NDArray[np.uint8]:
        """True pictures, uint8 [n, side, side, 3]; each of its own seed."""
        key = (scenes, count, seed, side)
        if key not in self._truth:
            self._truth[key] = np.stack([one.draw(row, seed, side) for row, one in enumerate(asked(scenes, count))])
        return self._truth[key]

    def _save(self, name: str, pictures: NDArray[np.uint8], **more: NDArray[Any]) -> None:
        """Whole or not at all: pictures, their raw CLIP embeddings, and more."""
        beside = self.out / f"{name}.{os.getpid()}"
        with open(beside, "wb") as file:
            np.savez_compressed(file, pictures=pictures, embeddings=self._embeddings(pictures), **more)
        beside.rename(self.out / f"{name}.npz")


def read_back(pictures: NDArray[np.uint8], asked_for: list[Asked]) -> dict[str, Any]:
    """What the oracle sees: verdicts (attribute → a yes or no a picture) and every picture's objects."""
    readings = [oracle.read(picture) for picture in pictures]
    verdicts = [
        one.judge(picture, reading) for one, picture, reading in zip(asked_for, pictures, readings, strict=True)
    ]
    objects = [
        [[one.shape, one.colour, one.size, *(round(place, 4) for place in one.centre)] for one in reading.objects]
        for reading in readings
    ]
    return {"verdicts": {name: [int(one[name]) for one in verdicts] for name in verdicts[0]}, "objects": objects}


def resized(pictures: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """As `embed` makes the decoder's pictures of the originals."""
    return np.stack([pixels(base_picture(Image.fromarray(picture), side)) for picture in pictures])


def unit(pictures: NDArray[np.uint8]) -> Tensor:
    """uint8 [n, h, w, 3] → [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1


def shown(x: Tensor) -> NDArray[np.uint8]:
    """The inverse of `unit`."""
    return to_uint8(x).permute(0, 2, 3, 1).contiguous().numpy()


def _tiles(count: int) -> list[list[int]]:
    return [list(range(first, min(first + TILE, count))) for first in range(0, count, TILE)]
