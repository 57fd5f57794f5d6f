from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from infra.errors import Refused, Stopped
from infra.tracking.monitor import NullMonitor
from tests.fixtures.fits import Tiny, tiny
from training.checkpoint.store import Checkpoints
from training.job import FitHow
from training.launch import discard, fit, request_stop, train_local

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHORT = {"steps": 12, "batch": 6, "micro": 3, "warmup": 3, "window": 3}
HOW = FitHow(cpus=0.5)
TWO = FitHow(workers=2, cpus=0.5)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    import ray

    root = str(Path(__file__).parents[2])
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": root}},
    )
    yield
    ray.shutdown()


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def trainers() -> list[int]:
    """Ids of the processes below this one that train."""
    found: list[int] = []
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if b"RayTrainWorker" in status.read_bytes() and os.getpid() in ancestors(int(status.parent.name)):
                found.append(int(status.parent.name))
    return found


def ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        yield pid


def test_a_fit_on_ray_gives_the_bytes_of_a_local_one(world, tmp_path):
    facts = fit(world.job("prior", "on-ray", **SHORT), HOW, world.store.uri, tmp_path / "ray", NullMonitor(), 1)
    local = train_local(world.job("prior", "local", **SHORT), HOW, world.store, tmp_path / "local", NullMonitor())
    assert facts == local
    assert weights(tmp_path / "ray") == weights(tmp_path / "local")
    assert (tmp_path / "ray" / "config.json").read_bytes() == (tmp_path / "local" / "config.json").read_bytes()


def test_what_training_refuses_is_refused_once_and_in_its_own_words(world, tmp_path):
    job = world.job("prior", "refused", **SHORT)
    job.model["embedding"] = 48
    with pytest.raises(Refused, match="made for a CLIP of embedding 48, and this CLIP has 32") as caught:
        fit(job, HOW, world.store.uri, tmp_path, NullMonitor(), 1)
    assert caught.value.code == 2


class Told(NullMonitor):
    """A monitor that notes each step in a file, which other processes can read."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def progress(self, stage: str, done: int, total: int, unit: str = "", rate: float | None = None) -> None:
        with self.path.open("a") as file:
            file.write(f"{done}\n")

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
        pass

    @property
    def steps(self) -> list[int]:
        return [int(line) for line in self.path.read_text().split()] if self.path.exists() else []


def test_a_worker_told_to_end_saves_and_its_successor_goes_on_from_there(world, tmp_path):
    job = world.job("decoder", "told", **{**SHORT, "steps": 200})
    told, signalled = Told(tmp_path / "steps"), []

    def end() -> None:
        while not told.steps:
            time.sleep(0.02)
        for pid in trainers():
            os.kill(pid, signal.SIGTERM)
            signalled.append(pid)

    ender = threading.Thread(target=end)
    ender.start()
    how = FitHow(cpus=0.5, checkpoint_seconds=1000, log_seconds=0)  # so that what is saved is saved for the signal
    fit(job, how, world.store.uri, tmp_path / "told", told, 1)
    ender.join()
    assert len(signalled) == 1
    assert told.steps == list(range(1, 201))  # no step was lost, or done twice
    train_local(world.job("decoder", "untold", **{**SHORT, "steps": 200}), HOW, world.store, tmp_path, NullMonitor())
    assert weights(tmp_path / "told") == weights(tmp_path)


def test_a_fit_begins_with_fewer_workers_than_it_wants_and_goes_on_with_another_number(world, tmp_path):
    job = world.job("prior", "elastic", **SHORT)
    request_stop(world.store, job.key, 5)
    wants = FitHow(workers=3, least_workers=1, cpus=1)  # of which the cluster holds two
    with pytest.raises(Stopped):
        fit(job, wants, world.store.uri, tmp_path, NullMonitor(), 5)
    saved = Checkpoints(world.store, job.key).newest()
    assert set(saved.files) == {"00000-of-00002.safetensors", "00001-of-00002.safetensors"}
    assert fit(job, HOW, world.store.uri, tmp_path / "one", NullMonitor(), 6)["samples"] == 72


def test_a_killed_worker_is_started_again_and_nothing_is_lost(world, tmp_path):
    job = world.job("decoder", "killed", **{**SHORT, "steps": 60})
    how = FitHow(cpus=0.5, checkpoint_seconds=0)
    killed = []

    def kill() -> None:
        while Checkpoints(world.store, job.key).newest() is None:
            time.sleep(0.02)
        for pid in trainers():
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    fit(job, how, world.store.uri, tmp_path / "killed", NullMonitor(), 1)
    killer.join()
    assert len(killed) == 1
    undisturbed = world.job("decoder", "undisturbed", **{**SHORT, "steps": 60})
    train_local(undisturbed, HOW, world.store, tmp_path / "undisturbed", NullMonitor())
    assert weights(tmp_path / "killed") == weights(tmp_path / "undisturbed")


@pytest.mark.parametrize("how", [HOW, TWO], ids=["one", "two"])
def test_a_fit_that_is_asked_to_stop_saves_and_stops_at_once(world, tmp_path, how):
    job = world.job("decoder", f"stopped-{how.workers}", **{**SHORT, "steps": 100_000})
    request_stop(world.store, job.key, 5)
    with pytest.raises(Stopped, match=r"^decoder stopped at step") as caught:
        fit(job, how, world.store.uri, tmp_path, NullMonitor(), 5)
    assert caught.value.code == 5
    assert Checkpoints(world.store, job.key).newest().samples > 0
    discard(world.store, job.key)
    assert list(world.store.list(f"checkpoints/{job.key}/")) == []


def test_a_fit_that_diverges_on_two_workers_is_not_started_again(world, tmp_path):
    job = world.job("prior", "diverged", **{**SHORT, "steps": 100, "lr": 1e30})
    with pytest.raises(Refused, match=r"^the gradient was not finite, or leapt, in 50 steps in a row") as caught:
        fit(job, TWO, world.store.uri, tmp_path, NullMonitor(), 1)
    assert caught.value.code == 5


def test_two_workers_see_the_batch_that_one_would_see(world, tmp_path):
    job = world.job("prior", "two", **SHORT)
    facts = fit(job, TWO, world.store.uri, tmp_path / "two", NullMonitor(), 1)
    train_local(world.job("prior", "one", **SHORT), HOW, world.store, tmp_path / "one", NullMonitor())
    assert facts["samples"] == 72

    import torch

    from unclip.files import read_tensors

    alone = read_tensors(tmp_path / "one" / "model.safetensors")
    for name, tensor in read_tensors(tmp_path / "two" / "model.safetensors").items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-3, atol=1e-4)
