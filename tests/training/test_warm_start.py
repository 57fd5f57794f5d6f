"""Fits that go on from a release, of every kind, on other data and at a rate of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infra.errors import Stopped
from infra.store.base import Store
from infra.tracking.monitor import NullMonitor
from tests.fixtures.cells import FULL
from tests.fixtures.fits import Tiny, stored_tree, tiny
from tests.training.test_loop import HOW, contents
from training.job import KINDS, Job
from training.launch import train_local
from unclip.errors import Refused as Impossible
from unclip.files import read_tensors, write_tensors

SHORT = {"steps": 3, "batch": 4, "micro": 2, "warmup": 0, "window": 3, "ema": 0.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("tiny"))


def released(store: Store, folder: Path) -> str:
    """The version of a release of the models in that folder, as the pipeline stores one."""
    (folder / "release.json").write_text("{}")
    return stored_tree(store, folder)


@pytest.mark.parametrize(
    "kind",
    [
        "prior",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ar_prior", "upsampler")),
        *(pytest.param(kind, marks=FULL) for kind in KINDS if kind not in ("prior", "ar_prior", "upsampler")),
    ],
)
def test_every_kind_goes_on_from_a_release_at_its_own_rate(world: Tiny, tmp_path: Path, kind: str):
    first = world.startable(kind, f"first-{kind}", **SHORT)
    train_local(first, HOW, world.store, tmp_path / "release" / kind, NullMonitor())
    version = released(world.store, tmp_path / "release")
    weights = read_tensors(tmp_path / "release" / kind / "model.safetensors")
    ends = {}
    for lr in (1e-12, 1e-3):
        job = world.startable(kind, f"on-{kind}-{lr}", **SHORT | {"lr": lr, "seed": 9})
        job = replace(job, data=job.data | {"start": version})
        train_local(job, HOW, world.store, tmp_path / str(lr), NullMonitor())
        ends[lr] = read_tensors(tmp_path / str(lr) / "model.safetensors")
    statistics = [n for n, t in weights.items() if "running" in n or "num_batches" in n]  # batch norms see new data
    for name in weights.keys() - set(statistics):
        torch.testing.assert_close(ends[1e-12][name], weights[name], rtol=0, atol=1e-6, msg=name)
    assert any(not torch.equal(ends[1e-3][name], weights[name]) for name in weights)


def test_statistics_and_the_empty_text_stay_those_of_the_release_on_other_data(world: Tiny, tmp_path: Path):
    first = world.job("prior", "first", **SHORT)
    train_local(first, HOW, world.store, tmp_path / "release/prior", NullMonitor())
    path = tmp_path / "release/prior/model.safetensors"
    changed = read_tensors(path) | {"mean": torch.full((32,), 0.5)}  # as other data would have had it

    write_tensors(path, changed)
    version = released(world.store, tmp_path / "release")
    job = world.job("prior", "on", **SHORT)
    job = replace(job, data=job.data | {"start": version})
    with pytest.raises(Stopped):
        train_local(job, HOW, world.store, tmp_path / "on", NullMonitor(), stop=lambda: True)
    train_local(job, HOW, world.store, tmp_path / "on", NullMonitor(), lease_number=1)
    whole = replace(job, key="whole")
    train_local(whole, HOW, world.store, tmp_path / "whole", NullMonitor())
    assert contents(tmp_path / "on") == contents(tmp_path / "whole")
    assert torch.equal(read_tensors(tmp_path / "on/model.safetensors")["mean"], changed["mean"])


def test_a_release_without_that_model_or_of_another_shape_is_refused(world: Tiny, tmp_path: Path):
    train_local(world.job("prior", "there", **SHORT), HOW, world.store, tmp_path / "release/prior", NullMonitor())
    version = released(world.store, tmp_path / "release")

    def on(job: Job) -> Job:
        return replace(job, data=job.data | {"start": version})

    with pytest.raises(Impossible, match="it has prior"):
        train_local(on(world.job("decoder", "none", **SHORT)), HOW, world.store, tmp_path / "x", NullMonitor())
    other = on(world.job("prior", "wide", **SHORT))
    other.model["depth"] += 1
    with pytest.raises(Impossible, match=r"warm start.*depth"):
        train_local(other, HOW, world.store, tmp_path / "x", NullMonitor())
