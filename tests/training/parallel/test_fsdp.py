"""FSDP2 against the flat way and against a single process: the same batch, dropout on, in processes over gloo."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.errors import Refused, Stopped
from infra.tracking.monitor import NullMonitor
from tests.fixtures.fits import Tiny, tiny
from tests.fixtures.ranks import Ask, Told, stopping_after, together
from training.checkpoint.store import Checkpoints, deliver_model
from training.job import FitHow, Job
from training.launch import train_local
from training.learner import build_model, is_sharded
from training.objectives.choice import objective
from training.parallel.flat import Group
from unclip.files import read_tensors

SHORT = {"steps": 4, "batch": 6, "micro": 2, "warmup": 2, "window": 3, "weight_decay": 0.1, "eps": 1e-3}
"""With Adam's usual ε the last bits of a gradient that is nearly 0 (a key's bias) would decide a step's sign."""
KINDS = ("prior", "decoder", "upsampler")
FLAT, FSDP = (
    FitHow(shard="flat", checkpoint_seconds=1000, log_seconds=0),
    FitHow(shard="fsdp", checkpoint_seconds=1000, log_seconds=0),
)
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
"""Sums are added in another order."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("tiny"))


def job(world: Tiny, kind: str, key: str, **train: Any) -> Job:
    made = world.job(kind, f"{kind}-{key}", **SHORT | train)
    return replace(made, model={**made.model, "dropout": 0.2})


def delivered(world: Tiny, job: Job, out: Path) -> dict[str, torch.Tensor]:
    assert deliver_model(world.store, job, out / job.key) is not None
    return read_tensors(out / job.key / "model.safetensors")


@pytest.mark.slow
def test_shards_flat_vectors_and_one_process_train_the_same_model(world, tmp_path):
    asks = [Ask(job(world, kind, how.shard), how) for how in (FLAT, FSDP) for kind in KINDS]
    # what a checkpoint holds fits another number of workers, and the other way to hold the model
    asks += [Ask(job(world, "decoder", f"from-{how.shard}"), how, 1, 3) for how in (FLAT, FSDP)]
    with pytest.raises(Stopped):
        train_local(job(world, "decoder", "to"), FLAT, world.store, tmp_path, NullMonitor(), stop=stopping_after(3))
    choosing = {"ema_lengths": [0.05, 0.25], "ema_validation": 16}
    asks += [Ask(job(world, "decoder", f"chosen-{how.shard}", **choosing), how) for how in (FLAT, FSDP)]
    met = together(Path(world.store.uri), 2, [*asks, Ask(job(world, "decoder", "to"), FSDP, 1)])
    assert met == [""] * 6 + ["decoder stopped at step 3 of 4"] * 2 + [""] * 3
    for kind in KINDS:
        told = Told(tmp_path, f"{kind}-one")
        train_local(job(world, kind, "one"), FLAT, world.store, tmp_path / kind, told)
        alone = read_tensors(tmp_path / kind / "model.safetensors")
        assert {"loss", "loss_q0"} < set().union(*told.losses)
        for how in ("flat", "fsdp"):
            torch.testing.assert_close(delivered(world, job(world, kind, how), tmp_path), alone, **CLOSE)
            of_both = Told(Path(world.store.uri), f"{kind}-{how}").losses  # not those of rank 0's samples alone
            torch.testing.assert_close(of_both, told.losses, **CLOSE)
    alone = read_tensors(tmp_path / "decoder" / "model.safetensors")
    torch.testing.assert_close(delivered(world, job(world, "decoder", "to"), tmp_path), alone, **CLOSE)
    # of several averages each is put into the shards, and all ranks see the loss that a whole model has
    fits = [job(world, "decoder", f"chosen-{how}", **choosing) for how in ("flat", "fsdp")]
    facts = [deliver_model(world.store, fit, tmp_path / f"{fit.key}-facts")["averages"] for fit in fits]
    losses = [[one["loss"] for one in told["candidates"]] for told in facts]
    assert losses[0][0] != losses[0][1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(*(delivered(world, fit, tmp_path) for fit in fits), **CLOSE)
    for how, parts in (("flat", {1}), ("fsdp", {1, 2})):
        saved = Checkpoints(world.store, f"decoder-from-{how}").newest()
        assert {len(stored.parts) for stored in saved.tensors.values()} == parts
        assert set(saved.files) == {"00000-of-00002.safetensors", "00001-of-00002.safetensors"}
        train_local(job(world, "decoder", f"from-{how}"), FLAT, world.store, tmp_path / how, NullMonitor())
        torch.testing.assert_close(read_tensors(tmp_path / how / "model.safetensors"), alone, **CLOSE)


@pytest.mark.parametrize(("kind", "train"), [("decoder", {"muon": 0.02}), ("noised_clip", {})])
def test_what_cannot_be_sharded_is_refused_if_asked_for_and_stays_whole_if_not(world, kind, train):
    fit = world.job(kind, "refused", **SHORT | train)
    task = objective(fit, world.store, torch.device("cpu"))
    with pytest.raises(Refused, match="shard is fsdp, and"):
        is_sharded(FSDP, fit.config, whole_batch=task.whole_batch, parameters=6, ranks=2, room=math.inf)
    assert not is_sharded(FitHow(), fit.config, whole_batch=task.whole_batch, parameters=6, ranks=2, room=1)


@pytest.mark.parametrize("kind", [*KINDS, "ar_prior", "inpainter", "classifier"])
def test_of_a_sharded_model_rank_0_alone_has_weights_at_the_start_and_they_are_a_whole_ones(world, kind):
    fit = world.startable(kind, "start", **SHORT)
    task = objective(fit, world.store, torch.device("cpu"))
    whole, first, second = (
        build_model(fit, task, how, Group(rank, 2), torch.device("cpu"))
        for how, rank in ((FLAT, 1), (FSDP, 0), (FSDP, 1))
    )
    assert [sharded for _, sharded in (whole, first, second)] == [False, True, True]
    held = [dict((*model.named_parameters(), *model.named_buffers())) for model, _ in (whole, first, second)]
    assert all(torch.equal(held[1][name], tensor) for name, tensor in held[0].items())
    assert all(tensor.is_meta for tensor in held[2].values())
    assert [[(name, t.shape, t.dtype, t.requires_grad) for name, t in of.items()] for of in held[1:]] == [
        [(name, t.shape, t.dtype, t.requires_grad) for name, t in held[0].items()]
    ] * 2


def test_auto_shards_what_one_gpu_has_too_little_room_for(world):
    config = world.job("prior", "auto", **SHORT).config
    found = [
        is_sharded(FitHow(), config, whole_batch=False, parameters=60, ranks=2, room=room)
        for room in (1999, 2001, math.inf)  # 60 parameters are 1200 bytes, and .6 of the room is for them
    ]
    assert found == [True, False, False]


def test_one_worker_has_nothing_to_share(world):
    fit = world.job("prior", "one", **SHORT)
    task = objective(fit, world.store, torch.device("cpu"))
    assert not is_sharded(FSDP, fit.config, whole_batch=task.whole_batch, parameters=6, ranks=1, room=1)
