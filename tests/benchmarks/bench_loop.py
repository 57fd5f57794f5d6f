"""What the training loop costs on top of the bare model: the same prior, decoder and upsampler, of the demo's size.

Run with `make bench`. The loop reads real shards, decodes pictures, averages weights, logs and tells a monitor; the
bare one multiplies tensors that lie in memory, by the same loss, with the frozen text tower, torch's own fused AdamW
and an average. What counts is processor time of all threads, so decoding is added to the bare side: each row once an
epoch. Medians of interleaved rounds, since machines differ and are noisy.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.monitor import NullMonitor
from tests.training.tiny import Tiny, tiny
from training.data import Batch, Data
from training.job import FitHow, Job
from training.launch import train_local
from training.objectives import objective
from training.parallel import Group
from unclip.presets import preset

CPU = torch.device("cpu")
STEPS, WARM, BATCH, ROUNDS = 40, 4, 16, 5
LEAST = 0.97
"""What the loop must reach of 1 / (1 / bare + 1 / decoding)."""


def demo_job(data: Tiny, kind: str, key: str, steps: int) -> Job:
    """A fit of the demo's model of that kind, on the tiny data's widths."""
    row, widths = preset("demo"), {"embedding": 32, "text_width": 32, "context": 24}
    models: dict[str, Any] = {
        "prior": replace(row.prior, **widths),
        "decoder": replace(row.decoder, size=16, unshuffle=2, **widths),
        "upsampler": replace(row.upsamplers[0], low=16, size=32),
    }
    return replace(data.job(kind, key, steps=steps, batch=BATCH), model=asdict(models[kind]))


def loop_seconds(data: Tiny, kind: str, out: Path, name: str) -> float:
    """Processor seconds of STEPS steps of the loop: a long fit less a short one, so that start and end are the same."""
    took = []
    for steps in (WARM, WARM + STEPS):
        job = demo_job(data, kind, f"{kind}-{name}-{steps}", steps)
        began = time.process_time()
        train_local(job, FitHow(), data.store, out / f"{kind}-{name}-{steps}", NullMonitor())
        took.append(time.process_time() - began)
    return took[1] - took[0]


def bare_seconds(data: Tiny, kind: str) -> float:
    """Processor seconds of STEPS steps of the same model on a batch that lies in memory."""
    torch.set_num_threads(1)
    task = objective(demo_job(data, kind, "bare", 1), data.store, CPU)
    model = task.build().train()
    batch = _reader(data, kind, task).batch([(0, row % 8) for row in range(BATCH)], 0)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    weights = list(model.parameters())
    average = [weight.detach().clone() for weight in weights]
    began = 0.0
    for step in range(WARM + STEPS):
        if step == WARM:
            began = time.process_time()
        tensors = batch.tensors
        if task.read_text is not None:
            tensors = tensors | task.read_text(batch.captions)
        task.loss(model, Batch(step, batch.uids, batch.captions, tensors), Group()).loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, [weight.detach() for weight in weights], 0.001)
    return time.process_time() - began


def decode_seconds(data: Tiny, kind: str) -> float:
    """Processor seconds in which the rows of STEPS steps are read and decoded, each once an epoch; no captions."""
    task = objective(demo_job(data, kind, "decode", 1), data.store, CPU)
    reader = _reader(data, kind, task)
    reader.read_text = None
    began = time.process_time()
    for number in range(len(reader.counts)):
        reader.block(number)
    rows = sum(reader.counts)
    return (time.process_time() - began) * min(STEPS * BATCH, rows) / rows


def _reader(data: Tiny, kind: str, task: Any) -> Data:
    job = demo_job(data, kind, "reader", 1)
    return Data(
        data.store, job.data["rows"], job.data["selection"], task.reads, read_text=task.read_text, cache=1 << 30
    )


@pytest.mark.parametrize("kind", ["prior", "decoder", "upsampler"])
def test_the_loop_reaches_the_bare_models_speed(tmp_path: Path, kind: str) -> None:
    data = tiny(tmp_path / "store", shards=4, count=250, group=64)
    bare_seconds(data, kind)
    ratios = []
    for number in range(ROUNDS):
        bare, loop = bare_seconds(data, kind), loop_seconds(data, kind, tmp_path, str(number))
        ratios.append((bare + decode_seconds(data, kind)) / loop)
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"\n{kind}: the loop reaches {middle:.2f} ({low:.2f} to {high:.2f}, {ROUNDS} rounds) of the bare model's speed"
    )
    assert middle >= LEAST
