"""What the training loop costs on top of the bare model: the same decoder, batch and optimiser, one thread each.

Run with `make bench`. The loop reads real shards, averages weights and tells a monitor; the bare loop multiplies
resident tensors. Medians of interleaved repeats, as a ratio, since machines differ and are noisy.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from infra.monitor import NullMonitor
from tests.training.tiny import Tiny, tiny
from training.job import FitHow
from training.launch import train_local
from unclip.decoder import Decoder, DecoderConfig
from unclip.presets import preset

STEPS, WARM, BATCH = 24, 4, 16


def loop_seconds(data: Tiny, config: DecoderConfig, out: Path, repeat: int) -> float:
    """Seconds of STEPS steps of the loop: a long fit less a short one, so that both have the same start and end."""
    took = []
    for steps in (WARM, WARM + STEPS):
        job = data.job("decoder", key=f"bench-{repeat}-{steps}", steps=steps, batch=BATCH)
        began = time.perf_counter()
        train_local(replace(job, model=asdict(config)), FitHow(), data.store, out / f"{repeat}-{steps}", NullMonitor())
        took.append(time.perf_counter() - began)
    return took[1] - took[0]


def bare_seconds(config: DecoderConfig) -> float:
    """Seconds of STEPS steps of the same model on tensors that lie in memory."""
    torch.set_num_threads(1)
    model = Decoder(config)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    x, t = torch.randn(BATCH, 3, config.size, config.size), torch.randint(1000, (BATCH,))
    image, text = torch.randn(BATCH, config.embedding), torch.randn(BATCH, config.embedding)
    states = torch.randn(BATCH, config.context, config.text_width)
    mask = torch.ones(BATCH, config.context, dtype=torch.bool)
    for step in range(WARM + STEPS):
        if step == WARM:
            began = time.perf_counter()
        model(x, t, model.context(image, text, states, mask)).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    return time.perf_counter() - began


def test_the_loop_reaches_most_of_the_bare_models_speed(tmp_path: Path) -> None:
    data = tiny(tmp_path / "store")
    config = replace(preset("demo").decoder, size=16, embedding=32, text_width=32, unshuffle=2)
    rounds = [(bare_seconds(config), loop_seconds(data, config, tmp_path, n)) for n in range(3)]
    ratio = statistics.median(bare / loop for bare, loop in rounds)
    print(f"\nloop: {ratio:.2f} of the bare model's samples/s (median of {len(rounds)}, demo's decoder, batch {BATCH})")
    assert ratio > 0.75
