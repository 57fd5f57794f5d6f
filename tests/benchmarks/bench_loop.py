"""What the training loop costs on top of the bare model: the same prior, decoder and upsampler, of the demo's size and
of a tile of `base`: its first two levels, or two of its blocks, as wide as they are there, on small pictures.

Run with `make bench`. The loop reads real shards, decodes pictures, reads captions, averages weights, logs and tells a
monitor; the bare one multiplies tensors that lie in memory, by the same loss, with the frozen text tower, torch's own
fused AdamW and an average. What counts is processor time of all threads, on one core, of the steps between the first
few and the last; each row is read once in them, so decoding is added to the bare side. What a process does once
(counting the model's operations) a fit before has done. Both sides take a few steps in turn, and medians of rounds
count, since machines are noisy. UNCLIP_BENCH_ROUNDS sets the number of rounds (7; of tiles 3).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.tracking.monitor import NullMonitor
from tests.benchmarks.measure import one_core
from tests.fixtures.fits import CLIP, Tiny, tiny
from training.data.batches import Batch, Data
from training.job import FitHow, Job
from training.launch import train_local
from training.objectives.choice import objective
from training.parallel.flat import Group
from unclip.presets import BASE, DEMO

CPU = torch.device("cpu")
WARM, TURN, GROUP = 4, 2, 64
"""Steps before what is timed, steps in turn, and rows of a block."""
LEAST = 0.97
"""What the loop must reach of 1 / (1 / bare + 1 / decoding)."""
DEMOS = {"embedding": 32, "text_width": 32, "context": 24}
TILES = {"embedding": 768, "text_width": 768, "context": 77}
WIDE = {
    "embed_dim": 768,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 600, "width": 768, "heads": 12, "layers": 1},
}
"""A CLIP of ViT-L/14's widths."""


@dataclass(frozen=True)
class Case:
    """A model, and how much of it is timed."""

    kind: str
    model: Any
    steps: int
    batch: int = 16
    rounds: int = 7
    clip: Any = None
    """open_clip's configuration of the CLIP; default that of the tests' data."""


CASES = {
    "demo prior": Case("prior", replace(DEMO.prior, **DEMOS), 80),
    "demo decoder": Case("decoder", replace(DEMO.decoder, size=16, unshuffle=2, **DEMOS), 40),
    "demo upsampler": Case("upsampler", replace(DEMO.upsamplers[0], low=16, size=32), 60),
    "base-tile prior": Case("prior", replace(BASE.prior, depth=2, **TILES), 8, 4, 3, WIDE),
    "base-tile decoder": Case(
        "decoder", replace(BASE.decoder, size=16, multiples=(1, 2), depth=1, attention=(8,), **TILES), 8, 4, 3, WIDE
    ),
    "base-tile upsampler": Case(
        "upsampler", replace(BASE.upsamplers[0], low=8, size=32, multiples=(1, 2), depth=1), 8, 4, 3
    ),
}


def made(data: Tiny, case: Case, key: str) -> Job:
    """A fit of that case, whose steps read blocks as they need them: each window is one."""
    asked = {"steps": WARM + case.steps, "batch": case.batch, "window": 1}
    return replace(data.job(case.kind, key, **asked), model=asdict(case.model))


class Bare:
    """The same model on batches that lie in memory, and the processor time of its steps in `seconds`."""

    def __init__(self, data: Tiny, case: Case) -> None:
        self.task = objective(made(data, case, "bare"), data.store, CPU)
        self.model = self.task.build().train()
        self.batches = cycle(list(islice(_batches(_reader(data, case, self.task), case), 8)))
        self.optimiser = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.weights = list(self.model.parameters())
        self.average = [weight.detach().clone() for weight in self.weights]
        self.seconds = 0.0

    def step(self) -> None:
        """One step, timed by this thread's clock: whoever reads for the loop meanwhile is not counted."""
        began = time.thread_time()
        batch = next(self.batches)
        tensors = batch.tensors
        if self.task.read_text is not None:
            tensors = tensors | self.task.read_text(batch.captions)
        again = Batch(batch.seed, batch.uids, batch.captions, tensors)
        self.task.loss(self.model, again, Group()).loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [weight.detach() for weight in self.weights], 0.001)
        self.seconds += time.thread_time() - began


def both_seconds(data: Tiny, case: Case, bare: Bare, out: Path, key: str) -> tuple[float, float]:
    """Processor seconds of as many steps of a fit, behind its first ones, and of the bare model, a few of each in
    turn."""
    asked, began, took = 0, 0.0, 0.0

    def stop() -> bool:  # once a step, between its backward pass and its update
        nonlocal asked, began, took
        asked += 1
        if asked == WARM:
            bare.seconds, began = 0.0, time.process_time()
        elif asked > WARM and (asked - WARM) % TURN == 0:
            for _ in range(TURN):
                bare.step()
            took = time.process_time() - began - bare.seconds
        return False

    train_local(made(data, case, key), FitHow(), data.store, out / key, NullMonitor(), stop=stop)
    return took, bare.seconds


def decode_seconds(data: Tiny, case: Case) -> float:
    """Processor seconds in which the rows of as many steps are read and decoded; no captions."""
    reader = _reader(data, case, objective(made(data, case, "decode"), data.store, CPU))
    rows = 0
    began = time.process_time()
    for number, count in enumerate(reader.counts):
        reader.block(number)
        rows += count
        if rows >= case.steps * case.batch:
            break
    return (time.process_time() - began) * case.steps * case.batch / rows


def _reader(data: Tiny, case: Case, task: Any) -> Data:
    job = made(data, case, "reader")
    task.reads = replace(task.reads, text=False)  # both sides' captions are read by the towers that are timed
    return Data(data.store, job.data["rows"], job.data["selection"], task.reads, cache=1 << 30)


def _batches(reader: Data, case: Case) -> Iterator[Batch]:
    rows = ((block, row) for block, count in enumerate(reader.counts) for row in range(count))
    while taken := list(islice(rows, case.batch)):
        yield reader.batch(taken, 0)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CASES)
def test_the_loop_reaches_the_bare_models_speed(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    one_core()
    torch.set_num_threads(1)
    # Of the rows that are made .68 are kept: enough for every step to see new ones.
    shards = 2 + (WARM + case.steps) * case.batch // 170
    data = tiny(tmp_path / "store", shards=shards, count=250, group=GROUP, model=case.clip or CLIP)
    bare = Bare(data, case)
    both_seconds(data, case, bare, tmp_path, "before")
    rounds = int(os.environ.get("UNCLIP_BENCH_ROUNDS", case.rounds))
    ratios, steps = [], []
    for number in range(rounds):
        loop, alone = both_seconds(data, case, bare, tmp_path, str(number))
        ratios.append((alone + decode_seconds(data, case)) / loop)
        steps.append(loop / case.steps * 1000)
    middle = statistics.median(ratios)
    print(
        f"\n{name}: the loop reaches {middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {rounds} rounds) of the "
        f"bare model's speed; {statistics.median(steps):.1f} ms a step of {case.batch}; load {os.getloadavg()[0]:.1f}"
    )
    assert middle >= LEAST
