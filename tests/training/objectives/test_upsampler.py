"""How a fit corrupts an upsampler's condition, and what its options leave as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from infra.errors import Refused
from pipelines.stage import plain
from tests.fixtures.fits import Tiny, tiny
from training.data.batches import Batch
from training.objectives.upsampler import UpsamplerObjective
from training.options import UpsamplerTrain
from training.parallel.flat import Group
from unclip.degrade.bsr import gaussian_blur
from unclip.pictures import to_unit


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(Path(tmp_path_factory.mktemp("corruption")))


def fit(world: Tiny, **train) -> UpsamplerObjective:
    return UpsamplerObjective(world.job("upsampler", steps=1, **train), world.store, torch.device("cpu"))


def batch(count: int = 6, seed: int = 11) -> Batch:
    images = torch.randint(256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Batch(seed, [bytes([n]) * 16 for n in range(count)], [""] * count, {"image": images})


def chosen(whole: Batch, rows: list[int]) -> Batch:
    return Batch(whole.seed, [whole.uids[n] for n in rows], [""] * len(rows), {"image": whole.tensors["image"][rows]})


def low(rows: Batch) -> torch.Tensor:
    return F.avg_pool2d(to_unit(rows.tensors["image"]), 2)


def test_the_default_is_the_blur_that_it_always_was(world):
    made = fit(world)._corrupted(low(batch()), batch())
    sigmas = 0.6 * torch.rand(6, generator=torch.Generator().manual_seed(11))
    assert torch.equal(made, gaussian_blur(low(batch()), sigmas))


def test_an_option_at_its_default_is_in_no_key():
    train = UpsamplerTrain(steps=1)
    assert plain(train) == plain(UpsamplerTrain(steps=1, corruption="blur", strength=1.0))
    assert not {"corruption", "strength"} & set(plain(train))
    said = plain(UpsamplerTrain(steps=1, corruption="bsr", strength=0.5))
    assert said == plain(train) | {"corruption": "bsr", "strength": 0.5}
    assert UpsamplerTrain(**said).corruption == "bsr"


@pytest.mark.parametrize("corruption", ["bsr", "bsr_light"])
def test_a_samples_degradation_comes_from_its_uid_and_the_micro_batchs_seed(world, corruption):
    task, rows = fit(world, corruption=corruption), [4, 0, 3]
    whole, part = batch(), chosen(batch(), rows)
    made = task._corrupted(low(whole), whole)
    assert torch.equal(task._corrupted(low(part), part), made[rows])
    again = batch(seed=12)
    assert not torch.equal(task._corrupted(low(again), again), made)


def test_none_and_strength_0_corrupt_nothing(world):
    for train in ({"corruption": "none"}, {"corruption": "bsr", "strength": 0.0}, {"blur": 0.0}):
        assert torch.equal(fit(world, **train)._corrupted(low(batch()), batch()), low(batch()))


@pytest.mark.parametrize("corruption", ["blur", "bsr_light", "bsr", "none"])
def test_every_corruption_trains_on_crops(world, corruption):
    task = fit(world, corruption=corruption, crop=16)
    torch.manual_seed(0)
    model = task.build()
    loss = task.loss(model, batch(), Group()).loss
    loss.mean().backward()
    assert loss.shape == (6,)
    assert torch.isfinite(loss).all()
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())


@pytest.mark.parametrize(
    ("train", "named"),
    [
        ({"corruption": "fog"}, "train.corruption is 'fog'; use one of blur"),
        ({"corruption": "bsr", "strength": -1.0}, "train.strength is -1.0"),
        ({"corruption": "bsr", "strength": float("nan")}, "train.strength"),
        ({"strength": 0.5}, "the strength of a blur is train.blur"),
    ],
)
def test_the_impossible_is_refused(train, named):
    with pytest.raises(Refused, match=named):
        UpsamplerTrain(steps=1, **train)
