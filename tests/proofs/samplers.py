"""Fewest steps: sampler × steps × quality of a release's decoder and prior, on the shapes world's held-out prompts.

    python -m tests.proofs.samplers --store DIR [--release champion] [--out DIR] [--docs docs]

Every cell draws the same prompts with the same seeds, so the same z_i and the same x_T, and is compared picture by
picture with 250 steps of DDPM. A cell is done once: its numbers are a line of OUT/cells.jsonl, its pictures and CLIP
embeddings lie beside it; a second call goes on where the first was stopped. The page is written from those files.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from infra.store.opening import open_store
from pipelines.embed.stage import base_picture
from pipelines.evaluate.grids import pixels
from pipelines.release.open import open_release
from pipelines.shapes.oracle import judge
from pipelines.shapes.world import picture_of, prompts, scene_of, true_pictures
from unclip.cascade import UnCLIP
from unclip.diffusion.analytic import estimate_gamma
from unclip.diffusion.guidance import conditional
from unclip.diffusion.settings import Sampling
from unclip.metrics import cosine
from unclip.models.prior import DiffusionPrior
from unclip.pictures import to_uint8

TILE = 64
AGAIN = 10_000
"""Added to every seed of a cell that repeats the reference: what other noise alone changes."""
GAMMA_SAMPLES = 32
"""Pictures of the training list over which Analytic-DPM's γ is measured."""


@dataclass(frozen=True)
class Cell:
    """One way to sample one model; the others keep the release's."""

    component: str
    """decoder, prior, or cascade: a decoder's pictures drawn on to the full size."""
    sampler: str
    steps: int
    seed: int = 0
    """Added to every seed of the decoder."""

    @property
    def name(self) -> str:
        """As its files are called."""
        return f"{self.component}-{self.sampler}-{self.steps}" + (f"-seed{self.seed}" if self.seed else "")

    @property
    def below(self) -> Cell | None:
        """The cell whose pictures a cascade draws on from."""
        return Cell("decoder", self.sampler, self.steps, self.seed) if self.component == "cascade" else None


DECODER_REFERENCE, PRIOR_REFERENCE = Cell("decoder", "ddpm", 250), Cell("prior", "ddpm", 250)
DECODER_REPEAT = Cell("decoder", "ddpm", 250, AGAIN)
FEW = (12, 10, 8, 6, 4)
CELLS = (
    # What decides comes first, in case the time runs out.
    *(Cell("decoder", "dpm_solver_pp", steps) for steps in FEW),
    DECODER_REFERENCE,
    *(Cell("decoder", "ddim", steps) for steps in FEW),
    PRIOR_REFERENCE,
    *(Cell("prior", "dpm_solver_pp", steps) for steps in (2, 3, 4, 6, 8, 16)),
    *(Cell("decoder", "ddpm", steps) for steps in FEW),
    *(Cell("cascade", *chosen) for chosen in (("ddpm", 250), ("dpm_solver_pp", 12), ("dpm_solver_pp", 8), ("ddpm", 8))),
    *(Cell("prior", sampler, steps) for steps in (8, 4, 2) for sampler in ("ddim", "analytic_dpm", "ddpm")),
    *(Cell("decoder", "analytic_dpm", steps) for steps in FEW),
    Cell("prior", "analytic_dpm", 64),
    DECODER_REPEAT,
    *(Cell("decoder", sampler, 25) for sampler in ("dpm_solver_pp", "ddim", "ddpm", "analytic_dpm")),
    *(Cell("decoder", sampler, 16) for sampler in ("dpm_solver_pp", "ddim", "ddpm", "analytic_dpm")),
    *(Cell("decoder", sampler, 50) for sampler in ("dpm_solver_pp", "ddim", "ddpm", "analytic_dpm")),
    *(Cell("decoder", sampler, 100) for sampler in ("ddpm", "ddim", "analytic_dpm")),
    Cell("decoder", "ddim", 250),
)


class Bench:
    """A release with its prompts, in one process."""

    def __init__(self, store: str, release: str, count: int, out: Path) -> None:
        torch.set_num_threads(1)
        self.model = UnCLIP.load(open_release(open_store(store, create=False), release))
        self.model.tile = TILE
        if not isinstance(self.model.prior, DiffusionPrior):
            raise SystemExit("this table is about the steps of a diffusion prior, and the release's is autoregressive")
        self.prior = self.model.prior
        self.prompts, self.out = prompts("single", count, 0), out

    def run(self, cell: Cell) -> dict[str, Any]:
        """Draws a cell, writes its pictures and embeddings, and returns its line."""
        found: dict[str, Any]
        if cell.component == "cascade":
            pictures, seconds = self._drawn_on(cell)
            found = {}
        else:
            pictures, seconds, z = self._drawn(cell)
            near = cosine(z, self.true_embeddings()).mean()
            found = {"cosine": round(float(near), 5)} if cell.component == "prior" else {}
        save(self.out / f"{cell.name}.npz", pictures, self.embeddings(pictures))
        right = [judge(picture, one["expected"])["all"] for picture, one in zip(pictures, self.prompts, strict=True)]
        return {**asdict(cell), "count": len(right), "seconds": round(seconds, 2), "right": right, **found}

    def _drawn(self, cell: Cell) -> tuple[NDArray[np.uint8], float, Tensor]:
        """(pictures [n, s, s, 3], seconds spent in the component, raw z_i [n, d])."""
        model, parts, embeddings, seconds = self.model, [], [], 0.0
        settings = dict(model.sampling)
        settings[cell.component] = self._settings(cell)
        for rows in self._tiles():
            text, seeds = model.clip.encode_text([self.prompts[row]["prompt"] for row in rows]), rows
            started = time.perf_counter()
            z = model.sample_prior(text, seeds, settings["prior"])
            between = time.perf_counter()
            x = model.sample_decoder(z, text, [row + cell.seed for row in rows], settings["decoder"])
            ended = time.perf_counter()
            seconds += between - started if cell.component == "prior" else ended - between
            parts.append(shown(x))
            embeddings.append(z)
        return np.concatenate(parts), seconds, torch.cat(embeddings)

    def _drawn_on(self, cell: Cell) -> tuple[NDArray[np.uint8], float]:
        """The decoder's pictures of the same sampling, through the release's upsamplers."""
        assert cell.below is not None
        low = torch.from_numpy(np.load(self.out / f"{cell.below.name}.npz")["pictures"])
        parts, started = [], time.perf_counter()
        for rows in self._tiles():
            x = low[rows].permute(0, 3, 1, 2) / 127.5 - 1
            for upsampler in self.model.upsamplers:
                settings = self.model.sampling[f"upsampler-{upsampler.config.size}"]
                x = self.model.sample_upsampler(upsampler, x, rows, settings)
            parts.append(shown(x))
        return np.concatenate(parts), time.perf_counter() - started

    def _settings(self, cell: Cell) -> Sampling:
        released = self.model.sampling[cell.component]
        gamma = self.gamma(cell.component) if cell.sampler == "analytic_dpm" else ()
        return replace(released, sampler=cell.sampler, steps=cell.steps, eta=0.0, variance=None, gamma=gamma)

    def gamma(self, component: str) -> tuple[float, ...]:
        """γ of the unguided model over pictures of the training list, measured once."""
        path = self.out / f"gamma-{component}.json"
        if not path.exists():
            rows = range(GAMMA_SAMPLES)
            pictures = np.stack([picture_of(row, 0, 0.2) for row in rows])
            text = self.model.clip.encode_text([scene_of(row, 0, 0.2)[1] for row in rows])
            z = self.model.clip.encode_images(torch.from_numpy(pictures).permute(0, 3, 1, 2))
            if component == "prior":
                denoise = conditional(self.prior.denoise, self.prior.context(*text))
                found = estimate_gamma([(denoise, self.prior.standardise(z))], self.prior.schedule)
            else:
                decoder = self.model.decoder
                with torch.no_grad():
                    denoise = conditional(decoder.denoise, decoder.context(z, *text))
                x0 = torch.from_numpy(self.small(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
                found = estimate_gamma([(denoise, x0)], decoder.schedule)
            write(path, json.dumps(found.tolist()))
        return tuple(json.loads(path.read_text()))

    def truth(self) -> None:
        """Writes how the release is sampled, and true pictures of the prompts: small, as the decoder's data is, and
        at full size."""
        own = {name: f"{settings.sampler} {settings.steps}" for name, settings in self.model.sampling.items()}
        write(self.out / "released.json", json.dumps(own))
        for component in ("decoder", "cascade"):
            path = self.out / f"true-{component}.npz"
            if not path.exists():
                full = true_pictures(self.prompts, 0, self.model.size)
                pictures = self.small(full) if component == "decoder" else full
                save(path, pictures, self.embeddings(pictures))

    def true_embeddings(self) -> NDArray[np.float32]:
        """CLIP's raw embeddings of the true pictures at full size: z_i as the prior learned it."""
        return np.load(self.out / "true-cascade.npz")["embeddings"]

    def small(self, pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """As `embed` stores them for the decoder."""
        side = self.model.decoder.config.size
        return np.stack([pixels(base_picture(Image.fromarray(picture), side)) for picture in pictures])

    def embeddings(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Raw CLIP image embeddings [n, d]."""
        tensor = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
        return torch.cat([self.model.clip.encode_images(part) for part in tensor.split(TILE)]).numpy()

    def _tiles(self) -> list[list[int]]:
        numbers = list(range(len(self.prompts)))
        return [numbers[first : first + TILE] for first in range(0, len(numbers), TILE)]


def shown(x: Tensor) -> NDArray[np.uint8]:
    """[b, 3, s, s] in [-1, 1] → uint8 [b, s, s, 3]."""
    return to_uint8(x).permute(0, 2, 3, 1).contiguous().numpy()


def save(path: Path, pictures: NDArray[np.uint8], embeddings: NDArray[np.float32]) -> None:
    """Both in one file, whole or not at all."""
    beside = path.with_suffix(f".{os.getpid()}")
    with open(beside, "wb") as file:
        np.savez_compressed(file, pictures=pictures, embeddings=embeddings)
    beside.rename(path)


def write(path: Path, text: str) -> None:
    """A small file, whole or not at all."""
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.rename(path)


def note_commit(out: Path) -> None:
    """The commit under which the first cell was drawn."""
    path = out / "made.json"
    if not path.exists():
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        write(path, json.dumps({"commit": head.stdout.strip()}))


def lines(out: Path) -> dict[Cell, dict[str, Any]]:
    """What is done: cell → its line; a last line that was cut off counts as not there."""
    found = {}
    path = out / "cells.jsonl"
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        found[Cell(line["component"], line["sampler"], line["steps"], line["seed"])] = line
    return found


_bench: Bench


def _open(arguments: Sequence[Any]) -> None:
    global _bench
    _bench = Bench(*arguments)


def _truth() -> None:
    _bench.truth()


def _gamma(component: str) -> None:
    _bench.gamma(component)


def _run(cell: Cell) -> dict[str, Any]:
    return _bench.run(cell)


def main() -> None:
    """Draws what is missing, within the time, then writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="a store with a release of the recipe demo; it is only read")
    parser.add_argument("--release", default="champion")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the cells")
    parser.add_argument("--docs", type=Path, help="a folder for samplers.md and samplers.png; default OUT")
    parser.add_argument("--count", type=int, default=384, help="prompts; the demo's 32 held-out ones, again and again")
    parser.add_argument("--minutes", type=float, default=60, help="no cell is begun after this time")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    note_commit(arguments.out)
    end = time.monotonic() + 60 * arguments.minutes
    bench = (arguments.store, arguments.release, arguments.count, arguments.out)
    done = lines(arguments.out)
    if any(line["count"] != arguments.count for line in done.values()):
        raise SystemExit(f"{arguments.out} holds cells of another --count; give another folder")
    missing = [cell for cell in CELLS if cell not in done]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, spawn, _open, (bench,)) as pool:
        # What several cells read is made once, before them.
        for future in [pool.submit(_truth), *(pool.submit(_gamma, component) for component in ("decoder", "prior"))]:
            future.result()
        running: dict[Future[dict[str, Any]], Cell] = {}
        for cell in missing:
            # One cell a process and no queue, so that the time is kept; a cascade goes on from its decoder's pictures.
            while len(running) >= arguments.workers or cell.below in running.values():
                _settle(running, arguments.out)
            if time.monotonic() < end:
                running[pool.submit(_run, cell)] = cell
        while running:
            _settle(running, arguments.out)
    from tests.proofs.samplers_page import write_page

    write_page(arguments.out, arguments.docs or arguments.out, arguments.count)


def _settle(running: dict[Future[dict[str, Any]], Cell], out: Path) -> None:
    """Waits for one cell and writes its line."""
    future = next(as_completed(running))
    cell, line = running.pop(future), future.result()
    with open(out / "cells.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    share = sum(line["right"]) / line["count"]
    print(f"{cell.name}: {share:.3f} of {line['count']} right, {line['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
