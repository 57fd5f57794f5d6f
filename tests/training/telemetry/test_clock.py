"""What a fit tells of itself: where its time goes, how much of the machine it uses, which checkpoint it wrote."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from infra.documents import canonical, digest
from infra.errors import Stopped
from tests.fixtures.fits import Tiny, tiny
from tests.training.test_loop import SHORT, Seen, stopping_after
from training.checkpoint.store import Checkpoints
from training.job import FitHow
from training.launch import train_local
from training.telemetry import clock, stopwatch
from training.telemetry.mfu import Utilisation, computed_in, matmul_peak
from training.telemetry.stopwatch import Stopwatch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("tiny"))


def test_a_stopwatch_gives_each_part_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    watch = Stopwatch(CPU)
    for _ in range(3):
        now[0] += 3
        watch.lap("long")
        now[0] += 1
        watch.lap("short")
    assert watch.shares() == pytest.approx({"long": 0.75, "short": 0.25, "rest": 0.0})
    now[0] += 1
    assert watch.shares() == {"rest": 1.0}


def test_what_is_told_at_each_report(world: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "WORTHWHILE_S", 0.0)
    seen = Seen()
    job = world.job("prior", "told", **SHORT)
    train_local(job, FitHow(log_seconds=0, checkpoint_seconds=0), world.store, tmp_path, seen)
    parts = {"data", "forward_backward", "exchange", "optimiser", "checkpoint"}
    for values in seen.values:
        shares = {name.removeprefix("time/"): value for name, value in values.items() if name.startswith("time/")}
        assert parts <= set(shares)
        assert sum(shares.values()) == pytest.approx(1)
    assert all(values["time/checkpoint"] > 0 for values in seen.values[1:])
    assert all(0 < values["mfu"] < 2 for values in seen.values[1:])
    assert "mfu" not in seen.values[0]
    assert (seen.tags["unclip.device"], seen.tags["unclip.workers"]) == ("CPU", "1")


def test_nothing_is_measured_for_a_fit_that_is_over_soon(
    world: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "WORTHWHILE_S", 1e9)
    seen = Seen()
    train_local(world.job("prior", "short", **SHORT), FitHow(log_seconds=0), world.store, tmp_path, seen)
    assert seen.values
    assert not any("mfu" in values for values in seen.values)


def test_the_tag_of_a_checkpoint_is_its_digest(world: Tiny, tmp_path: Path) -> None:
    seen = Seen()
    job = world.job("prior", "tagged", **SHORT)
    with pytest.raises(Stopped):
        train_local(job, FitHow(), world.store, tmp_path, seen, stop=stopping_after(3))
    (place,) = Checkpoints(world.store, job.key)._places()
    document = Checkpoints(world.store, job.key)._document(place)
    assert seen.tags["unclip.checkpoint"] == digest(canonical(document))
    assert seen.tags["unclip.checkpoint.samples"] == str(document["samples"])


def test_figures_of_the_machine_come_with_the_metrics(world: Tiny, tmp_path: Path) -> None:
    seen = Seen()
    job = world.job("prior", "vitals", **SHORT | {"steps": 100})
    train_local(job, FitHow(log_seconds=0, system_seconds=0.01), world.store, tmp_path, seen)
    told = [values for values in seen.values if "system/cpu_utilization_percentage" in values]
    assert told
    assert all("loss" in values for values in told)
    assert told[0]["system/process_memory_megabytes"] > 50


def test_utilisation_is_operations_over_the_peak(world: Tiny) -> None:
    job = world.job("prior", "used", **SHORT)
    used = Utilisation(job, FitHow(peak_tflops=2.0), CPU, ranks=3)
    assert used.peak == 6e12
    assert used.of(10.0) == pytest.approx(10 * used.flops / 6e12)
    assert computed_in(world.job("decoder", "used", **SHORT, precision="bfloat16")) == torch.bfloat16


def test_measuring_the_peak_and_the_operations_draws_no_random_number(world: Tiny) -> None:
    before = torch.get_rng_state()
    used = Utilisation(world.job("decoder", "drawn", **SHORT), FitHow(), CPU, 1)
    assert torch.equal(torch.get_rng_state(), before)
    again = matmul_peak(CPU, torch.float32)
    assert used.peak > 1e8
    assert 0.1 < used.peak / again < 10
