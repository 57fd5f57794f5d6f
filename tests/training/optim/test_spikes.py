from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from infra.errors import Stopped
from infra.tracking.monitor import NullMonitor
from tests.fixtures.fits import Tiny, tiny
from tests.training.test_loop import Seen, contents, stopping_after
from training.checkpoint.store import Checkpoints
from training.data.order import shuffled
from training.job import FitHow, Job
from training.launch import train_local
from training.optim.optimizer import Diverged
from training.optim.spikes import LEAST, Spikes
from training.options import TrainConfig
from unclip.files import read_tensors

HOW = FitHow(checkpoint_seconds=1000)


def fed(spikes: Spikes, steps: int, seed: int = 0) -> list[bool]:
    """Verdicts over losses and norms that vary by a tenth, as a training's do."""
    random = np.random.default_rng(seed)
    verdicts = []
    for loss, norm in np.exp(0.1 * random.standard_normal((steps, 2))):
        verdicts.append(spikes.is_spike(loss, norm))
        spikes.note(loss, norm, taken=not verdicts[-1])
    return verdicts


def test_what_varies_as_it_always_did_is_no_spike_and_what_leaps_is_one():
    spikes = Spikes(TrainConfig(steps=1, spike=6))
    assert not any(fed(spikes, 2000))
    assert not spikes.is_spike(1.3, 1.3)
    assert spikes.is_spike(5, 1)
    assert spikes.is_spike(1, 5)
    assert spikes.is_spike(math.nan, 1)
    assert not spikes.is_spike(1e-3, 1e-3)  # a leap down is luck


def test_nothing_is_judged_before_there_is_something_to_judge_by_and_nothing_at_all_unless_asked():
    spikes = Spikes(TrainConfig(steps=1, spike=6))
    fed(spikes, LEAST - 1)
    assert not spikes.is_spike(1e9, 1e9)
    off = Spikes(TrainConfig(steps=1))
    fed(off, 200)
    assert not off.is_spike(1e9, math.inf)
    assert off.head == off.counters == {}


def test_many_spikes_do_not_move_what_they_are_measured_by():
    spikes = Spikes(TrainConfig(steps=1, spike=6))
    fed(spikes, 200)
    for _ in range(100):
        assert spikes.is_spike(50, 50)
        spikes.note(50, 50, taken=False)
    assert not any(fed(spikes, 200, seed=1))


def test_a_resumed_judge_decides_as_the_first_one_would():
    first = Spikes(TrainConfig(steps=1, spike=2))
    fed(first, 300)
    second = Spikes(TrainConfig(steps=1, spike=2))
    second.load(json.loads(json.dumps(first.head)))
    verdicts = fed(first, 300, seed=2)
    assert verdicts == fed(second, 300, seed=2)
    assert any(verdicts)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A third of the rows has absurd embeddings."""
    return tiny(tmp_path_factory.mktemp("tiny"), count=60, spoiled={0: 1e3})


def spoiled_job(world: Tiny, key: str, **train: object) -> Job:
    """Some 41 steps on good rows, then some 20 on the bad ones, then another epoch."""
    seed = next(seed for seed in range(10_000) if set(shuffled(9, "epoch", seed, 0)[-3:].tolist()) == {0, 1, 2})
    options = {"steps": 66, "batch": 2, "window": 1, "warmup": 3, "seed": seed, "spike": 8.0}
    return world.job("prior", key, **options | {"rollback_after": 10, "rollback_every": 10} | train)


@pytest.mark.slow
def test_bad_steps_are_skipped_and_the_run_returns_to_an_earlier_state_wherever_it_was_stopped(
    world: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    seen = Seen()
    how = replace(HOW, log_seconds=0)
    facts = train_local(spoiled_job(world, "whole"), how, world.store, tmp_path / "whole", seen)
    assert 16 <= facts["spikes"] == facts["skipped"] <= 25
    assert facts["rollbacks"] == 2
    assert "returned to the state of sample" in caplog.text
    assert seen.values[-1]["rollbacks"] == 2
    # each stop falls elsewhere: before the bad rows, amid them, after the first return and after the second
    parts = spoiled_job(world, "parts")
    for lease, steps in enumerate((20, 23, 8, 8)):
        with pytest.raises(Stopped):
            train_local(
                parts, HOW, world.store, tmp_path, NullMonitor(), lease_number=lease, stop=stopping_after(steps)
            )
    assert facts == train_local(parts, HOW, world.store, tmp_path / "parts", NullMonitor(), lease_number=9)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    unheeding = spoiled_job(world, "unheeding", spike=0.0)
    assert train_local(unheeding, HOW, world.store, tmp_path / "un", NullMonitor())["skipped"] == 0
    ends = [read_tensors(tmp_path / name / "model.safetensors")["out.weight"] for name in ("whole", "un")]
    assert not ends[0].equal(ends[1])


def test_the_state_to_return_to_outlives_newer_checkpoints(world: Tiny, tmp_path: Path):
    job = spoiled_job(world, "kept")
    with pytest.raises(Stopped):
        train_local(job, FitHow(checkpoint_seconds=0), world.store, tmp_path, NullMonitor(), stop=stopping_after(37))
    kept = Checkpoints(world.store, job.key)
    assert kept.newest().samples == 38 * 2
    assert kept.newest().head["anchor"] == 30 * 2
    assert kept.at(30 * 2) is not None
    assert kept.at(20 * 2) is None


def test_a_run_that_returns_too_often_has_diverged(world: Tiny, tmp_path: Path):
    with pytest.raises(Diverged, match="3 times already"):
        train_local(spoiled_job(world, "lost", rollback_after=3), HOW, world.store, tmp_path, NullMonitor())
