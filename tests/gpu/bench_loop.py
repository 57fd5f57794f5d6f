"""The training loop on one GPU: samples a second, the share of the matmul peak that was measured on the same card, and
memory, with and without activation checkpointing (`recompute`) and torch.compile.

    python -m tests.gpu.bench_loop [--device cuda] [--batch 64] [--models base] [--steps 20]

Needs torch, torchvision's Pillow, pyarrow and safetensors; neither Ray nor MLflow nor open_clip. Each fit is a whole
one: it reads and decodes rows, reads captions with a text tower of ViT-L/14's size and random weights, averages, clips,
steps and saves its model at the end, in bfloat16 with channels-last weights. A step ends when its gradient norm is on
the host. FLOPs are those of the model's convolutions, products and attention alone, without the text tower's and
without what recompute does again, so that the shares are of useful work. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from infra.tracking.monitor import NullMonitor
from tests.fixtures.fits import SIDE, Tiny, tiny
from tests.gpu.bench_models import TINY, peak
from training.cost import cost
from training.job import FitHow, Job
from training.loop import train
from unclip.presets import preset

WARM = 5
"""Steps that are not counted; the first one compiles."""
GROUP, SHARDS = 64, 4
KEPT = 0.8 * 6 / 7
"""Share of the rows of tests.fixtures.fits that a fit may read."""
VARIANTS = {
    "eager": FitHow(),
    "recompute": FitHow(recompute=True),
    "compile": FitHow(compile=True),
    "compile, recompute": FitHow(compile=True, recompute=True),
}


def clip(width: int, context: int, depth: int) -> dict[str, Any]:
    """A CLIP whose text tower has that size; its vocabulary is bytes alone, which needs no merges."""
    return {
        "embed_dim": width,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
        "text_cfg": {
            "context_length": context, "vocab_size": 514, "width": width, "heads": width // 64, "layers": depth,
        },
    }  # fmt: skip


def jobs(data: Tiny, name: str, tiny_ones: bool, batch: int, steps: int) -> Iterator[Job]:
    """A fit of the decoder and of the prior of a preset."""
    row = preset(name)
    models: dict[str, Any] = TINY if tiny_ones else {"decoder": row.decoder, "prior": row.prior}
    inputs = {"rows": data.embed, "selection": data.curate, "statistics": data.statistics, "clip": data.clip}
    options = {"steps": WARM + steps, "batch": batch, "window": 4, "warmup": 0, "precision": "bfloat16"}
    for kind, model in models.items():
        yield Job(f"{name} {kind}", kind, kind, asdict(model), options, inputs)


def step_seconds(job: Job, how: FitHow, data: Tiny, device: torch.device) -> float:
    """Seconds of a step of a whole fit, the median of those behind the first WARM."""
    ends: list[float] = []

    def asked() -> bool:  # once a step, whatever the answer
        ends.append(time.perf_counter())
        return False

    how = replace(how, channels_last=True, checkpoint_seconds=1e6)
    train(job, how, data.store, NullMonitor(), device=device, stop=asked)
    ends = ends[WARM - 1 :]
    return statistics.median(after - before for before, after in pairwise(ends))


def memory(device: torch.device) -> str:
    """The most that was allocated since the last call; nothing is known of a CPU's."""
    if device.type != "cuda":
        return "–"
    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return f"{most / 2**30:.1f} GiB"


def main() -> None:
    """Prints the card and a row for each fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--models", default="base")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="networks that a CPU can run, to try this file")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    best = peak(device, torch.bfloat16)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}: {best:.1f} TFLOP/s in bfloat16 products of large matrices\n")
    print("| fit | batch | how | samples/s | TFLOP/s | of the matmul peak | memory |\n|---|---|---|---|---|---|---|")
    rows = GROUP + round(asked.batch * (WARM + asked.steps) / KEPT)  # so that none is read twice
    tower = clip(64, 8, 1) if asked.tiny else clip(768, 77, 12)
    for name in asked.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            side = 16 if asked.tiny else SIDE
            sizes = {"shards": SHARDS, "count": -(-rows // SHARDS), "group": GROUP}
            data = tiny(Path(folder), model=tower, base=side, merges=(), **sizes)
            for job in jobs(data, name, asked.tiny, asked.batch, asked.steps):
                useful = cost(job.kind, job.model).flops
                for variant, how in VARIANTS.items():
                    if how.compile and asked.eager:
                        continue
                    memory(device)
                    one = replace(job, key=f"{job.kind}-{variant}")
                    rate = asked.batch / step_seconds(one, how, data, device)
                    used = rate * useful / 1e12
                    print(
                        f"| {job.stage} | {asked.batch} | {variant} | {rate:.1f} | {used:.3g} | {used / best:.1%} | "
                        f"{memory(device)} |",
                        flush=True,
                    )
                    if how.compile:
                        torch._dynamo.reset()


if __name__ == "__main__":
    main()
