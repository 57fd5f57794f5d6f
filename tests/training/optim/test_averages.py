from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import Refused, Stopped
from infra.store.local import LocalStore
from infra.tracking.monitor import NullMonitor
from tests.fixtures.cells import FULL
from tests.fixtures.fits import Tiny, tiny
from tests.training.objectives.test_objectives import again, furnished
from tests.training.test_loop import HOW, contents, stopping_after
from training.data.batches import Data
from training.job import KINDS
from training.launch import train_local
from training.learner import LossModule
from training.optim.averages import TRACKED, Averages
from training.optim.ema import PowerEma
from training.optim.optimizer import Optimiser
from training.optim.posthoc import Average, combination, decay, exponent, shares
from training.optim.precision import Precision
from training.options import TrainConfig
from training.parallel.flat import Flat, Group
from training.validate import batches, mean_loss, split_held_out
from unclip.release.model import load_model

CPU = torch.device("cpu")
OTHERS = (0.06, 0.14, 0.2)
"""Lengths that nobody tracks: between the tracked ones, and beyond."""
LENGTHS = st.floats(0.01, 0.28)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("tiny"))


@given(LENGTHS)
def test_a_lengths_exponent_gives_that_length_back(length: float):
    gamma = exponent(length)
    assert math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2) == pytest.approx(length, rel=1e-9)


def test_the_papers_exponents():
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)  # Karras et al. 2024, section 3.2
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)


@given(LENGTHS, st.integers(1, 60))
def test_the_shares_are_what_the_decays_multiply_to_and_sum_to_one(length: float, updates: int):
    share = shares([Average(updates, length)], 0, updates)[:, 0]
    kept = np.array([decay(length, t) for t in range(1, updates + 1)])
    expected = [(1 - kept[t]) * np.prod(kept[t + 1 :]) for t in range(updates)]
    np.testing.assert_allclose(share, expected, atol=1e-12)
    assert share.sum() == pytest.approx(1)


@given(LENGTHS)
def test_a_length_is_the_deviation_of_the_shares_as_a_fraction_of_the_training(length: float):
    share, time = shares([Average(2_000, length)], 0, 2_000)[:, 0], np.arange(1, 2_001) / 2_000
    mean = (share * time).sum()
    assert math.sqrt((share * (time - mean) ** 2).sum()) == pytest.approx(length, rel=0.02)


@given(LENGTHS, LENGTHS, st.integers(50, 100), st.integers(50, 100))
def test_products_of_shares_are_the_papers_integrals_in_long_trainings(a: float, b: float, t: int, s: int):
    # appendix C: ∫ p q of two profiles, in closed form
    first, second = exponent(a), exponent(b)
    powers = (t / s) ** (second if t < s else -first)
    closed = (first + 1) * (second + 1) * powers / ((first + second + 1) * max(t, s))
    both = shares([Average(50 * t, a), Average(50 * s, b)], 0, 50 * max(t, s))
    assert both[:, 0] @ both[:, 1] * 50 == pytest.approx(closed, rel=0.02)


def test_what_was_kept_is_reconstructed_as_it_was():
    kept = [Average(updates, length) for updates in (100, 200, 300) for length in TRACKED]
    for place, average in enumerate(kept):
        factors, missed = combination(kept, average)
        np.testing.assert_allclose(factors, np.eye(6)[place], atol=1e-5)
        assert missed < 1e-5


def relative(found: dict[str, torch.Tensor], direct: PowerEma) -> float:
    """Distance to what was tracked, as a fraction of its norm."""
    tracked = direct.tensors()
    ours, theirs = (torch.cat([of[name].flatten() for name in tracked]).double() for of in (found, tracked))
    return float((ours - theirs).norm() / theirs.norm())


def test_a_random_walks_averages_of_other_lengths_are_reconstructed(tmp_path: Path):
    # Weights that nothing holds together: the hardest path, of which a training's is a smooth relative.
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 40)
    flat, config = Flat(model), TrainConfig(steps=2000, ema_lengths=OTHERS)
    store, averages = LocalStore(tmp_path), Averages(model, flat, config)
    direct = {length: PowerEma(model, flat, length) for length in OTHERS}
    for update in range(1, config.steps + 1):
        with torch.no_grad():
            flat.weights.add_(torch.randn_like(flat.weights))
        for average in (averages, *direct.values()):
            average.update(update)
        if averages.due(update, update):
            averages.snapshot(store, "walk", update, Group())
    assert len(averages.snapshots) == config.ema_snapshots
    errors = {length: relative(averages.reconstructed(store, "walk", length)[0], direct[length]) for length in OTHERS}
    assert max(errors.values()) < 1e-3, errors


@pytest.mark.slow
def test_a_trainings_averages_of_other_lengths_are_reconstructed(world: Tiny, tmp_path: Path):
    task, model, batch = furnished(world, "prior")
    flat, config = Flat(model), TrainConfig(steps=200, ema_lengths=OTHERS)
    start, optimiser, averages = flat.weights.clone().double(), Optimiser(flat, config), Averages(model, flat, config)
    direct = {length: PowerEma(model, flat, length) for length in OTHERS}
    for step in range(1, config.steps + 1):
        flat.gradient.zero_()
        task.loss(model, again(batch, step), Group()).loss.mean().backward()
        optimiser.step(1e-2)
        for average in (averages, *direct.values()):
            average.update(step)
        if averages.due(step, step):
            averages.snapshot(world.store, "training", step, Group())
    for length in OTHERS:
        found, _ = averages.reconstructed(world.store, "training", length)
        assert relative(found, direct[length]) < 1e-3
        assert torch.equal(found["null_text.states"], model.null_text.states)  # what never changed is not rounded
    assert (flat.weights - start).norm() > start.norm()  # it did go somewhere


CHOOSING = {"steps": 12, "batch": 4, "micro": 2, "warmup": 3, "window": 3, "lr": 0.01, "ema_validation": 16}


@pytest.mark.parametrize(
    "kind",
    [
        "prior",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("inpainter", "classifier")),
        *(
            pytest.param(kind, marks=FULL)
            for kind in KINDS
            if kind not in ("prior", "ar_prior", "inpainter", "classifier")
        ),
    ],
)
def test_the_released_average_is_the_one_of_least_loss_and_survives_a_stop(world: Tiny, tmp_path: Path, kind: str):
    options = {**CHOOSING, "ema_lengths": [0.05, 0.1, 0.25]}
    whole, parts = (world.startable(kind, f"{kind}-{key}", **options) for key in ("whole", "parts"))
    facts = train_local(whole, HOW, world.store, tmp_path / "whole", NullMonitor())
    for lease, steps in enumerate((4, 2)):
        with pytest.raises(Stopped):
            train_local(
                parts, HOW, world.store, tmp_path / "x", NullMonitor(), lease_number=lease, stop=stopping_after(steps)
            )
    train_local(parts, HOW, world.store, tmp_path / "parts", NullMonitor(), lease_number=2)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    told = facts["averages"]
    losses = {one["length"]: one["loss"] for one in told["candidates"]}
    assert list(losses) == [0.05, 0.1, 0.25]
    assert len(set(losses.values())) == 3
    assert told["released"] == min(losses, key=losses.__getitem__)
    assert told["snapshots"] == 12


def test_the_loss_that_is_told_is_that_of_the_released_model_on_rows_that_were_never_trained_on(world, tmp_path):
    job = world.job("prior", "told", **CHOOSING, ema_lengths=[0.05, 0.25])
    told = train_local(job, HOW, world.store, tmp_path, NullMonitor())["averages"]
    task, _, _ = furnished(world, "prior")
    rows = Data(world.store, job.data["rows"], job.data["selection"], task.reads, read_text=task.read_text)
    kept, held = split_held_out(rows, job.config)
    assert held is not None
    trained, shown = ({uid for n in range(len(d.counts)) for uid in d.block(n).uids} for d in (kept, held))
    assert not trained & shown
    assert trained | shown == {uid for n in range(len(rows.counts)) for uid in rows.block(n).uids}
    learner = LossModule(load_model(tmp_path, "prior"), task, Group())
    loss = mean_loss(learner, batches(held, job.config), Precision("float32", CPU))
    losses = {one["length"]: one["loss"] for one in told["candidates"]}
    assert loss == losses[told["released"]]


def test_one_length_is_released_without_holding_rows_out(world: Tiny, tmp_path: Path):
    job = world.job("prior", "one", **CHOOSING, ema_lengths=[0.2])
    told = train_local(job, HOW, world.store, tmp_path, NullMonitor())["averages"]
    assert told["released"] == 0.2
    assert set(told) == {"released", "candidates", "snapshots"}
    plain = world.job("prior", "plain", **CHOOSING)
    train_local(plain, HOW, world.store, tmp_path / "plain", NullMonitor())
    assert (tmp_path / "plain/model.safetensors").read_bytes() != (tmp_path / "model.safetensors").read_bytes()


def test_a_damaged_snapshot_is_left_out(world: Tiny, tmp_path: Path, caplog):
    _, model, _ = furnished(world, "prior")
    flat = Flat(model)
    averages = Averages(model, flat, TrainConfig(steps=2, ema_lengths=(0.1,)))
    for update in (1, 2):
        flat.weights.data.add_(1)
        averages.update(update)
        averages.snapshot(world.store, f"damaged-{tmp_path.name}", update, Group())
    path = world.store.local(f"checkpoints/damaged-{tmp_path.name}/averages/{averages.snapshots[0][1]}")
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    averages.reconstructed(world.store, f"damaged-{tmp_path.name}", 0.1)
    assert "left out" in caplog.text
    path.unlink()
    world.store.local(f"checkpoints/damaged-{tmp_path.name}/averages/{averages.snapshots[1][1]}").unlink()
    with pytest.raises(Refused, match="no snapshot"):
        averages.reconstructed(world.store, f"damaged-{tmp_path.name}", 0.1)


def test_lengths_beyond_any_average_and_too_many_held_out_rows_are_refused(world: Tiny, tmp_path: Path):
    with pytest.raises(Refused, match="ema_lengths"):
        TrainConfig(steps=1, ema_lengths=(0.3,))
    job = world.job("prior", "half", **CHOOSING | {"ema_validation": 500}, ema_lengths=[0.1, 0.2])
    with pytest.raises(Refused, match="at most half"):
        train_local(job, HOW, world.store, tmp_path, NullMonitor())
