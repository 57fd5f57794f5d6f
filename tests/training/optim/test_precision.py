from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from infra.errors import Refused, Stopped
from infra.tracking.monitor import NullMonitor
from tests.fixtures.cells import FULL, marked
from tests.fixtures.fits import Tiny, tiny
from tests.training.test_loop import HOW, Seen, contents, stopping_after
from training.checkpoint.store import Checkpoints
from training.job import KINDS
from training.launch import train_local
from training.optim.precision import INTERVAL, Scaler
from training.options import DecoderTrain, TrainConfig
from unclip.files import read_tensors

SHORT = {"steps": 2, "batch": 4, "micro": 2, "warmup": 0, "window": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("tiny"))


def test_the_scale_moves_as_torchs_own_scaler_moves_it():
    finite = [number not in (0, 1, INTERVAL + 10) for number in range(INTERVAL + 20)]
    ours, weight = Scaler(), torch.zeros(1, requires_grad=True)
    theirs = torch.amp.GradScaler("cpu", init_scale=ours.scale, growth_interval=INTERVAL)
    optimiser = torch.optim.SGD([weight], lr=0.0)
    for good in finite:
        theirs.scale(torch.zeros(()))  # it makes its tensors at the first use
        weight.grad = torch.full((1,), 1.0 if good else torch.inf)
        theirs.step(optimiser)
        theirs.update()
        ours.update(finite=good)
        assert ours.scale == theirs.get_scale()
    assert ours.scale == 2**16 / 2**2 * 2 / 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", marked(KINDS, ("decoder", "clip", "noised_clip"), *FULL))
def test_every_kind_trains_in_half_precision_and_goes_on_to_the_same_bytes(world: Tiny, tmp_path: Path, kind: str):
    models = {}
    for precision in ("float32", "bfloat16", "float16"):
        job = world.startable(kind, f"{precision}-whole-{kind}", precision=precision, **SHORT)
        facts = train_local(job, HOW, world.store, tmp_path / precision, NullMonitor())
        models[precision] = read_tensors(next((tmp_path / precision).glob("*.safetensors")))
    parts = world.startable(kind, f"parts-{kind}", precision="float16", **SHORT)
    with pytest.raises(Stopped):
        train_local(parts, HOW, world.store, tmp_path / "parts", NullMonitor(), stop=lambda: True)
    train_local(parts, HOW, world.store, tmp_path / "parts", NullMonitor(), lease_number=1)
    assert contents(tmp_path / "parts") == contents(tmp_path / "float16")
    for half in ("bfloat16", "float16"):
        assert {name: tensor.dtype for name, tensor in models[half].items()} == {
            name: tensor.dtype for name, tensor in models["float32"].items()
        }
    assert 0 < _distance(models["float32"], models["bfloat16"]) < 0.05
    if not facts["skipped"]:  # CLIP's first gradients are too large for the first scale
        assert 0 < _distance(models["float32"], models["float16"]) < 0.05


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of two models' floating-point tensors, relative to the first one's norm."""
    pairs = [(one[name], other[name]) for name in one if one[name].is_floating_point()]
    apart = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return math.sqrt(apart / sum(float(a.double().square().sum()) for a, _ in pairs))


@pytest.mark.parametrize("kind", ["prior", "decoder"])
def test_the_gradient_in_half_precision_is_float32s_up_to_rounding(world: Tiny, tmp_path: Path, kind: str):
    norms = {}
    for precision in ("float32", "bfloat16", "float16"):
        seen, one = Seen(), {**SHORT, "steps": 1}
        job = world.job(kind, f"norm-{precision}-{kind}", precision=precision, **one)
        train_local(job, HOW, world.store, tmp_path / precision, seen)
        norms[precision] = seen.values[0]["gradient_norm"]
    assert norms["bfloat16"] == pytest.approx(norms["float32"], rel=0.05)
    assert norms["float16"] == pytest.approx(norms["float32"], rel=0.01)
    assert len(set(norms.values())) == 3


def test_an_overflow_is_skipped_and_counted_and_the_scale_is_in_the_checkpoint(tmp_path: Path):
    # A third of the embeddings is finite in float32, and beyond float16's largest number.
    world = tiny(tmp_path / "store", spoiled={0: 1e6})
    options = {**SHORT, "steps": 8, "batch": 2, "micro": 2, "window": 6, "precision": "float16"}
    job, whole = (world.job("prior", key, **options) for key in ("overflow", "whole"))
    with pytest.raises(Stopped):
        train_local(job, HOW, world.store, tmp_path / "a", NullMonitor(), stop=stopping_after(6))
    head = Checkpoints(world.store, job.key).newest().head
    assert 0 < head["skipped"] < 7
    assert head["updates"] + head["skipped"] == 7
    assert head["scaler"]["scale"] == 2**16 / 2 ** head["skipped"]
    facts = train_local(job, HOW, world.store, tmp_path / "a", NullMonitor(), lease_number=1)
    assert facts["skipped"] >= head["skipped"]
    assert facts == train_local(whole, HOW, world.store, tmp_path / "b", NullMonitor())
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_precision_that_there_is_not_is_refused():
    with pytest.raises(Refused, match="float64"):
        TrainConfig(steps=1, precision="float64")
    with pytest.raises(Refused, match="bfloat16_convolutions"):
        DecoderTrain(steps=1, precision="float16", bfloat16_convolutions=True)
