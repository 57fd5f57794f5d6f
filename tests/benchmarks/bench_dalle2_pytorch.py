"""Our training loop against DALLE2-pytorch's own trainers: samples a second of one worker, on the CPU.

    make peers bench

Same rows, batch, sizes (width, depth, heads, channels; parameters within 5 %), loss (x0 for the prior; ε with learned
variances for the decoder), AdamW, clipping and moving average; the captions of both are read by a frozen CLIP of one
configuration while training. Ours is the whole loop, that logs and ends with a finished model; theirs are its trainers
and loaders (tests/benchmarks/peers/dalle2_pytorch_trainers.py), in an environment of its own. What is timed is a long
fit less a short one, so that start and end are the same: processor time of all threads and loader processes, which
share one core, and time on the clock beside it, both in float32 and under autocast to bfloat16. UNCLIP_BENCH_ROUNDS
sets the number of rounds (3).
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from infra.records.manifest import Manifest
from infra.records.objects import object_name
from infra.tracking.monitor import NullMonitor
from tests.benchmarks.embedding import Took, timed
from tests.benchmarks.measure import one_core
from tests.fixtures.fits import Tiny, tiny
from training.data.batches import Data
from training.job import FitHow, Job
from training.launch import train_local
from training.objectives.choice import objective
from training.parallel.flat import Group
from unclip.models.decoder import DecoderConfig
from unclip.models.prior import PriorConfig

PEER = Path(__file__).parents[2] / ".venv-peers" / "dalle2-pytorch" / "bin" / "python"
SCRIPT = Path(__file__).parent / "peers" / "dalle2_pytorch_trainers.py"
ROUNDS = int(os.environ.get("UNCLIP_BENCH_ROUNDS", "3"))
LEAST = 1.5
"""Times their samples a second."""
ALIKE = 0.05
"""By which parameters may differ."""
BATCH, WARM = 16, 2
WIDTH, CONTEXT, SIDE = 256, 77, 32
PRECISIONS = {"float32": "no", "bfloat16": "bf16"}
"""Autocast's on our side, and accelerate's name of the same."""
CLIP: dict[str, Any] = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": WIDTH, "heads": 4, "layers": 3},
}


@dataclass(frozen=True)
class Case:
    """A model of ours, its likeness among theirs, and the steps that are timed."""

    kind: str
    ours: PriorConfig | DecoderConfig
    network: dict[str, Any]
    """Keywords of their network."""
    model: dict[str, Any]
    """Keywords of the process around it."""
    steps: int
    last: tuple[str, ...] = ()
    """Precisions in which channels that lie last in memory make ours faster (DALLE2-pytorch has no such option)."""


CASES = {
    "prior": Case(
        "prior",
        PriorConfig(embedding=WIDTH, text_width=WIDTH, context=CONTEXT, width=WIDTH, depth=6, heads=8),
        # their MLP is gated, so 3.25 times the width has as many parameters as our 4; their keys have one head
        {"dim": WIDTH, "depth": 6, "heads": 8, "dim_head": WIDTH // 8, "ff_mult": 3.25, "num_timesteps": 1000,
         "max_text_len": CONTEXT, "normformer": True},
        {"timesteps": 1000, "cond_drop_prob": 0.1},
        20,
    ),
    "decoder": Case(
        "decoder",
        DecoderConfig(
            size=SIDE, embedding=WIDTH, text_width=WIDTH, context=CONTEXT, channels=64, multiples=(1, 2, 3, 4), depth=2,
            attention=(8, 4), head_channels=32, context_width=192, learned_range=True,
        ),
        # where cond_dim is the embedding's width, it takes z_i for one token and stops at the shapes
        {"dim": 64, "dim_mults": (1, 2, 3, 4), "num_resnet_blocks": 2, "self_attn": (False, False, True, True),
         "attn_dim_head": 32, "attn_heads": 8, "cond_dim": 192, "image_embed_dim": WIDTH, "text_embed_dim": WIDTH,
         "max_text_len": CONTEXT, "cond_on_text_encodings": True, "cond_on_image_embeds": True},
        {"image_size": SIDE, "timesteps": 1000, "learned_variance": True},
        6,
        last=("float32",),
    ),
}  # fmt: skip


def rows(data: Tiny) -> Iterator[list[dict[str, Any]]]:
    """The rows that a fit may read, a shard at a time."""
    for record in Manifest.load(data.store, data.embed).records:
        table = pq.read_table(io.BytesIO(data.store.get(object_name(record.sha("rows.parquet")))))
        yield [row for row in table.to_pylist() if row["uid"] in data.kept]


def export(data: Tiny, folder: Path) -> None:
    """The same rows as its loaders read them: tars of pictures (which must be called jpg, and are PNGs) and captions,
    embeddings as .npy, captions as .parquet."""
    for name in ("tars", "embeddings", "captions"):
        (folder / name).mkdir(parents=True)
    for shard, kept in enumerate(rows(data)):
        with tarfile.open(folder / "tars" / f"{shard:05d}.tar", "w") as tar:
            for number, row in enumerate(kept):
                for kind, body in (("jpg", row["image"]), ("txt", row["caption"].encode())):
                    info = tarfile.TarInfo(f"{shard:05d}{number:04d}.{kind}")
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))
        np.save(
            folder / "embeddings" / f"img_emb_{shard:05d}.npy",
            np.asarray([row["image_embedding"] for row in kept], np.float32),
        )
        pq.write_table(
            pa.table({"caption": [row["caption"] for row in kept]}),
            folder / "captions" / f"metadata_{shard:05d}.parquet",
        )


def job(data: Tiny, case: Case, steps: int, number: int = 0, **train: Any) -> Job:
    """Our fit; a window of one block, so that a step decodes as many rows as it learns from."""
    name = f"{case.kind}-{number}-{steps}"
    asked = {"steps": steps, "batch": BATCH, "window": 1, "lr": 3e-4, "warmup": 0, "decay": "constant"}
    inputs = {"rows": data.embed, "selection": data.curate, "statistics": data.statistics, "clip": data.clip}
    return Job(case.kind, name, case.kind, asdict(case.ours), asked | {"weight_decay": 0.01} | train, inputs)


def about(data: Tiny, case: Case) -> tuple[int, float]:
    """(parameters, FLOPs a sample of the forward and backward pass with the frozen text tower) of our model."""
    one = job(data, case, 1)
    task = objective(one, data.store, torch.device("cpu"))
    model: nn.Module = task.build().train()
    reader = Data(data.store, one.data["rows"], one.data["selection"], task.reads, read_text=task.read_text)
    with FlopCounterMode(display=False) as counter:
        batch = reader.batch([(0, row) for row in range(reader.counts[0])], 0)
        task.loss(model, batch, Group()).loss.sum().backward()
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / reader.counts[0]


class Peer:
    """DALLE2-pytorch in an environment of its own, kept running."""

    def __init__(self, case: Case, folder: Path, precision: str) -> None:
        clip = folder / "peer-clip.json"
        clip.write_text(json.dumps(CLIP))
        asked = {
            "kind": case.kind, "network": case.network, "model": case.model, "data": str(folder / "data"),
            "clip": str(clip), "batch": BATCH, "precision": precision,
            "optimiser": {"lr": 3e-4, "wd": 0.01, "max_grad_norm": 1.0},
        }  # fmt: skip
        with (folder / f"peer-{case.kind}-{precision}.log").open("w") as log:
            self._process = subprocess.Popen(
                [PEER, SCRIPT, json.dumps(asked)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        self.about = self._answer()

    def fit(self, steps: int) -> Took:
        """The cost of so many steps of a new model, from its building to its end."""
        assert self._process.stdin
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        answer = self._answer()
        return Took(answer["clock"], answer["processor"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"DALLE2-pytorch ended with code {self._process.wait()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)


def difference(long: Took, short: Took) -> Took:
    return Took(long.clock - short.clock, long.processor - short.processor)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CASES)
def test_a_fit_sees_more_samples_a_second_than_dalle2_pytorchs(tmp_path: Path, name: str) -> None:
    if not PEER.exists():
        pytest.skip("DALLE2-pytorch is not installed: make peers")
    case = CASES[name]
    one_core()
    torch.set_num_threads(1)
    data = tiny(tmp_path / "store", shards=4, count=250, group=BATCH, model=CLIP, base=SIDE)
    export(data, tmp_path / "data")
    parameters, flops = about(data, case)

    def ours(precision: str, steps: int, number: int) -> Took:
        one = job(data, case, steps, number, precision=precision)
        one = replace(one, key=f"{one.key}-{precision}")
        how = FitHow(channels_last=precision in case.last)
        return timed(lambda: train_local(one, how, data.store, tmp_path / one.key, NullMonitor()))

    found: dict[tuple[str, str], list[Took]] = {}
    with ExitStack() as opened:
        peers = {one: opened.enter_context(Peer(case, tmp_path, theirs)) for one, theirs in PRECISIONS.items()}
        told = next(iter(peers.values())).about
        print(
            f"\n{name}: ours {parameters / 1e6:.2f} M parameters, {flops / 1e9:.2f} GFLOP a sample; DALLE2-pytorch's "
            f"{told['parameters'] / 1e6:.2f} M, {told['flops'] / 1e9:.2f} (torch {told['torch']})",
            flush=True,
        )
        assert abs(parameters / told["parameters"] - 1) <= ALIKE
        for number in range(ROUNDS):
            for one, peer in peers.items():
                fits = {"ours": partial(ours, one, number=number), "theirs": peer.fit}
                for side in sorted(fits, reverse=number % 2 == 1):
                    short, long = fits[side](steps=WARM), fits[side](steps=WARM + case.steps)
                    found.setdefault((side, one), []).append(difference(long, short))
    samples = case.steps * BATCH
    for (side, one), took in found.items():
        processor, clock = (statistics.median(samples / each[kind] for each in took) for kind in (1, 0))
        print(f"  {side}, {one}: {processor:.1f} samples a processor second, {clock:.1f} a second on the clock")
    for one in PRECISIONS:
        told_ratio(f"{name}, {one}", found["ours", one], found["theirs", one])
    best = {
        side: min((found[side, one] for one in PRECISIONS), key=lambda took: statistics.median(t[1] for t in took))
        for side in ("ours", "theirs")
    }
    assert told_ratio(f"{name}, both at their best", best["ours"], best["theirs"]) >= LEAST


def told_ratio(what: str, ours: list[Took], theirs: list[Took]) -> float:
    """Median over the rounds of their processor time over ours; prints it with its spread and the machine's load."""
    ratios = sorted(other.processor / mine.processor for mine, other in zip(ours, theirs, strict=True))
    middle = statistics.median(ratios)
    print(
        f"{what}: {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, {len(ratios)} rounds) of their samples a second; "
        f"load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    return middle
