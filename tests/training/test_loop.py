from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.documents import canonical, digest_file
from infra.errors import Refused, Stopped
from infra.tracking.monitor import NullMonitor
from tests.fixtures.cells import marked
from tests.fixtures.fits import Tiny, tiny
from training.checkpoint.store import EARLIER, Checkpoints
from training.job import FitHow, Job
from training.launch import train_local
from training.objectives.choice import objective
from unclip.errors import Refused as Impossible
from unclip.files import read_json, read_tensors, write_tensors
from unclip.release.model import load_model

SHORT = {"steps": 12, "batch": 6, "micro": 3, "warmup": 3, "window": 3}
HOW = FitHow(checkpoint_seconds=1000)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "prior": ("prior", {}, {}),
    "ar_prior": ("ar_prior", {}, {}),
    "decoder": ("decoder", {}, {}),
    "glide": ("decoder", {"text": "own", "vocabulary": 600, "text_depth": 1, "text_heads": 4, "image": False}, {}),
    "upsampler": ("upsampler", {}, {}),
    "clip": ("clip", {}, {}),  # a ResNet, whose batch norms have statistics, on the whole batch
    "muon": ("decoder", {"dropout": 0.2}, {"muon": 0.02, "bfloat16_convolutions": True}),
}
"""Kind, changes of the model and training options of each way to train."""


@dataclass
class Seen(NullMonitor):
    """A monitor that keeps what it is told."""

    steps: list[int] = field(default_factory=list)
    values: list[dict[str, float]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    images: dict[int, bytes] = field(default_factory=dict)

    def progress(self, stage: str, done: int, total: int, unit: str = "", rate: float | None = None) -> None:
        self.steps.append(done)

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
        self.values.append(values)

    def tag(self, stage: str, tags: dict[str, str]) -> None:
        self.tags |= tags

    def image(self, stage: str, data: bytes, name: str, step: int) -> None:
        self.images[step] = data


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("tiny"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stopping_after(steps: int) -> Any:
    asked = iter(range(steps))
    return lambda: next(asked, None) is None


def case(world: Tiny, name: str, key: str) -> Job:
    """A short fit of `CASES`."""
    kind, model, train = CASES[name]
    job = world.job(kind, f"{key}-{name}", **{**SHORT, **train})
    return replace(job, model={**job.model, **model})


@pytest.fixture(scope="module")
def undisturbed(world: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """What the fit of a case ends in that nobody disturbs; made when it is first asked for."""

    @cache
    def made(name: str) -> dict[str, bytes]:
        out = tmp_path_factory.mktemp(name)
        train_local(case(world, name, "undisturbed"), HOW, world.store, out, Seen())
        return contents(out)

    return made


@pytest.mark.parametrize("name", marked(CASES, ["prior"], pytest.mark.slow))
def test_an_interrupted_run_ends_in_the_bytes_of_an_undisturbed_one(world, undisturbed, tmp_path, name):
    job = case(world, name, "interrupted")
    for lease, more in enumerate((0, 4, 1), 1):
        with pytest.raises(Stopped):
            train_local(job, HOW, world.store, tmp_path, Seen(), lease_number=lease, stop=stopping_after(more))
    assert Checkpoints(world.store, job.key).newest().samples == (1 + 5 + 2) * 6
    facts = train_local(job, HOW, world.store, tmp_path, Seen(), lease_number=4)
    assert contents(tmp_path) == undisturbed(name)
    assert facts["samples"] == 72


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        FitHow(cache_bytes=0, prefetch=1, checkpoint_seconds=0, log_seconds=0),
        FitHow(cache_bytes=1 << 28, prefetch=7, checkpoint_seconds=0.1, max_failures=0, cpus=2),
    ],
)
def test_how_a_model_is_trained_does_not_change_a_byte(world, undisturbed, tmp_path, how):
    job = world.job("decoder", f"how-{how.prefetch}", **SHORT)
    train_local(job, how, world.store, tmp_path, Seen())
    assert contents(tmp_path) == undisturbed("decoder")


def test_a_damaged_newest_checkpoint_costs_time_and_nothing_else(world, undisturbed, tmp_path, caplog):
    job = world.job("prior", "damaged", **SHORT)
    for lease in (1, 2):
        with pytest.raises(Stopped):
            train_local(job, HOW, world.store, tmp_path, Seen(), lease_number=lease, stop=stopping_after(3))
    (newest,) = Checkpoints(world.store, job.key).newest().files.values()
    newest.chmod(0o644)
    newest.write_bytes(newest.read_bytes()[:-1] + b"!")
    train_local(job, HOW, world.store, tmp_path, Seen(), lease_number=3)
    assert "passed over" in caplog.text
    assert contents(tmp_path) == undisturbed("prior")


def test_a_checkpoint_of_an_earlier_release_is_gone_on_from(world, undisturbed, tmp_path):
    # three files of whole tensors, and a manifest that does not say what is in them
    job = world.job("prior", "earlier", **SHORT)
    with pytest.raises(Stopped):
        train_local(job, HOW, world.store, tmp_path, Seen(), lease_number=1, stop=stopping_after(5))
    found = Checkpoints(world.store, job.key).newest()
    (path,) = found.files.values()
    tensors, place = read_tensors(path), found.place
    for name in [entry.name for entry in world.store.list(place)]:
        world.store.delete(name)
    files = {}
    for part in EARLIER:
        write_tensors(
            tmp_path / part, {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(part)}
        )
        assert world.store.put_new(f"{place}{part}.safetensors", tmp_path / part)
        about = {"sha256": digest_file(tmp_path / part), "bytes": (tmp_path / part).stat().st_size}
        files[f"{part}.safetensors"] = about
    head = {"updates": found.head["updates"], "skipped": 0}
    manifest = {"schema_version": 1, "samples": found.samples, "head": head, "files": files}
    assert world.store.put_new(f"{place}manifest.json", canonical(manifest))
    seen = Seen()
    train_local(job, FitHow(log_seconds=0), world.store, tmp_path / "out", seen, lease_number=2)
    assert seen.steps[0] == 7
    assert contents(tmp_path / "out") == undisturbed("prior")


def test_a_finished_fit_is_delivered_again_without_training(world, undisturbed, tmp_path):
    expected, seen = undisturbed("prior"), Seen()
    train_local(world.job("prior", "undisturbed-prior", **SHORT), HOW, world.store, tmp_path, seen)
    assert contents(tmp_path) == expected
    assert seen.steps == []


def test_the_released_folder_loads_and_says_how_it_was_made(world, tmp_path):
    seen = Seen()
    job = world.job("prior", "said", **SHORT)
    facts = train_local(job, FitHow(log_seconds=0), world.store, tmp_path, seen)
    model = load_model(tmp_path, "prior")
    assert bool(model.std.eq(1).all())
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    document = read_json(tmp_path / "config.json", "prior")
    assert (document["facts"], document["train"]) == (facts, SHORT)
    assert document["clip"] == facts["clip"]
    assert facts["data"] == job.data
    assert seen.steps == list(range(1, 13))
    assert {"loss", "gradient_norm", "lr", "samples_per_s"} <= set(seen.values[-1])
    assert any(name.startswith("loss_q") for name in seen.values[-1])


def test_an_autoregressive_prior_is_released_with_its_bounds(world, tmp_path):
    seen = Seen()
    job = world.job("ar_prior", "bounds", **SHORT | {"steps": 2, "ema": 0.5})
    facts = train_local(job, FitHow(log_seconds=0), world.store, tmp_path, seen)
    start = objective(job, world.store, torch.device("cpu")).build()
    model = load_model(tmp_path, "ar_prior")
    for name, buffer in start.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name  # averaging leaves what never changes as it is
    assert not torch.equal(model.out.weight, start.out.weight)
    assert facts["components"] == 6
    assert "loss" in seen.values[-1]
    assert not any(name.startswith("loss_q") for name in seen.values[-1])


def test_micro_batches_of_one_batch_add_up_to_its_mean_loss(world, tmp_path):
    # the first step's gradient norm is that of the whole batch, however it is cut, up to its own noise
    seen = {}
    for micro in (2, 4):
        seen[micro] = Seen()
        job = world.job("prior", f"micro-{micro}", steps=1, batch=64, micro=micro)
        train_local(job, HOW, world.store, tmp_path / str(micro), seen[micro])
    two, four = (seen[micro].values[0] for micro in (2, 4))
    assert two["gradient_norm"] == pytest.approx(four["gradient_norm"], rel=0.5)
    assert two["loss"] == pytest.approx(four["loss"], rel=0.3)


def test_a_model_for_another_clip_is_refused(world, tmp_path):
    job = world.job("prior", "other", **SHORT)
    job.model["embedding"] = 48
    with pytest.raises(Refused, match="made for a CLIP of embedding 48, and this CLIP has 32"):
        train_local(job, HOW, world.store, tmp_path, Seen())


def test_a_crop_that_the_upsampler_cannot_halve_is_refused(world, tmp_path):
    with pytest.raises(Impossible, match=r"train.crop is 6; it must divide by 4"):
        train_local(world.job("upsampler", "crop", steps=1, crop=6), HOW, world.store, tmp_path, Seen())


KILLED = """
import json, sys
from pathlib import Path
from tests.training.test_loop import FitHow, Seen, train_local
from infra.store.local import LocalStore
from training.job import Job
root, out, job, lease = sys.argv[1:]
how = FitHow(checkpoint_seconds=0)
train_local(Job(**json.loads(job)), how, LocalStore(Path(root)), Path(out), Seen(), lease_number=int(lease))
"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_in_the_bytes_of_an_undisturbed_one(world, undisturbed, tmp_path):
    job = world.job("decoder", "killed", **SHORT)
    kills = 0
    for lease in range(1, 20):
        arguments = [str(world.store.uri), str(tmp_path), json.dumps(asdict(job)), str(lease)]
        process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], env={**os.environ, "PYTHONPATH": "."})
        before = len(list(world.store.list(f"checkpoints/{job.key}/")))
        if lease < 4:  # somewhere inside a write, or between two
            while process.poll() is None and len(list(world.store.list(f"checkpoints/{job.key}/"))) <= before + lease:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
    assert kills >= 2
    assert contents(tmp_path) == undisturbed("decoder")
