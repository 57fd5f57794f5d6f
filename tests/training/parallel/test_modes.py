from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from infra.tracking.monitor import NullMonitor
from tests.fixtures.cells import FULL, marked
from tests.fixtures.fits import CLIP, Tiny, tiny
from tests.training.objectives.test_objectives import again
from tests.training.test_loop import contents
from training.data.batches import Data
from training.data.order import Order
from training.job import KINDS, FitHow, Job
from training.launch import train_local
from training.objectives.choice import objective
from training.parallel.flat import Flat, Group
from training.parallel.modes import compile_parts, determinism, prepare_model, seed
from unclip.files import read_tensors

CPU = torch.device("cpu")
SHORT = {"steps": 2, "batch": 4, "micro": 2, "warmup": 0, "window": 3}
VIT = {**CLIP, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}}
LAST = torch.channels_last


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("tiny"))


def dropping(world: Tiny, kind: str, key: str = "k") -> Job:
    """A fit with dropout, where that kind knows it; of a CLIP with a vision transformer."""
    job = world.startable(kind, f"{key}-{kind}", **SHORT)
    if kind == "clip":
        return replace(job, model=VIT)
    return replace(job, model=job.model | {"dropout": 0.3}) if "dropout" in job.model else job


def furnished(world: Tiny, job: Job):
    """(objective, model in training mode, a batch of 8)."""
    task = objective(job, world.store, CPU)
    torch.manual_seed(0)
    data = Data(world.store, job.data["rows"], job.data["selection"], task.reads, read_text=task.read_text)
    model = task.build().train()
    for parameter in model.parameters():  # what starts at zero would hide the branches behind it
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return task, model, data.batch(Order(data.counts, 1, 8, 4, 0).rows(0, 0), seed=5)


def gradient(task, model: nn.Module, batch) -> torch.Tensor:
    """The flat gradient of the mean loss, its dropout from one seed."""
    flat = Flat(model)
    torch.manual_seed(7)
    task.loss(model, again(batch), Group()).loss.mean().backward()
    return flat.gradient


@pytest.mark.parametrize("number", [0, 7, 2**63 - 1, -(2**63)])
def test_a_models_own_randomness_is_that_of_torchs_seed(number: int) -> None:
    torch.manual_seed(number)
    drawn = torch.nn.functional.dropout(torch.ones(100))
    seed(number, CPU)
    assert torch.equal(torch.nn.functional.dropout(torch.ones(100)), drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_gives_the_same_gradient_to_the_bit_with_dropout(world: Tiny, kind: str):
    task, model, batch = furnished(world, dropping(world, kind))
    less, times = copy.deepcopy(model), list[int]()
    prepare_model(less, FitHow(recompute=True), sharded=False)
    blocks = [module for module in less.modules() if type(module).__name__.endswith("Block")]
    for module in blocks:
        next(module.children()).register_forward_pre_hook(lambda *_: times.append(1))
    assert torch.equal(gradient(task, model, batch), gradient(task, less, batch))
    assert len(times) == 2 * len(blocks)  # on the way there, and again on the way back


@pytest.mark.parametrize("kind", ["decoder", "upsampler", "clip"])
def test_channels_last_is_the_same_model_in_another_layout(world: Tiny, tmp_path: Path, kind: str):
    # without dropout, which draws in the order of memory
    job = replace(world.job(kind, **SHORT), model=VIT) if kind == "clip" else world.job(kind, **SHORT)
    task, model, batch = furnished(world, job)
    last = copy.deepcopy(model)
    prepare_model(last, FitHow(channels_last=True), sharded=False)
    expected, found = (torch.cat([g.flatten() for g in _named(task, m, batch)]) for m in (model, last))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    turned = [p for p in last.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert turned
    for parameter in turned:
        assert parameter.is_contiguous(memory_format=LAST)
        assert parameter.grad is not None
        assert parameter.grad.is_contiguous(memory_format=LAST)


def _named(task, model: nn.Module, batch) -> list[torch.Tensor]:
    """The gradient by name, whatever the layout."""
    gradient(task, model, batch)
    return [parameter.grad for _, parameter in sorted(model.named_parameters())]


def test_a_fit_in_another_layout_with_muon_ends_near_the_plain_one_and_goes_on(world: Tiny, tmp_path: Path):
    ends = {}
    for last in (False, True):
        job = world.job("decoder", f"layout-{last}", **SHORT, muon=0.02)
        job = replace(job, model=asdict(replace(_decoder(job), dropout=0.0)))
        how = FitHow(channels_last=last, checkpoint_seconds=0)
        train_local(job, how, world.store, tmp_path / str(last), NullMonitor())
        ends[last] = read_tensors(tmp_path / str(last) / "model.safetensors")
    for name, tensor in ends[False].items():
        torch.testing.assert_close(ends[True][name], tensor, rtol=0.01, atol=1e-3, msg=name)


def _decoder(job: Job):
    from unclip.release.model import config_from

    return config_from("decoder", job.model, "test")


def test_determinism_and_recomputing_do_not_change_a_byte_of_a_fit(world: Tiny, tmp_path: Path):
    for name, how in (("plain", FitHow()), ("both", FitHow(recompute=True, deterministic=True))):
        train_local(dropping(world, "decoder", name), how, world.store, tmp_path / name, NullMonitor())
    assert contents(tmp_path / "plain") == contents(tmp_path / "both")
    assert not torch.are_deterministic_algorithms_enabled()


def test_in_deterministic_mode_what_depends_on_chance_is_refused():
    x = torch.randn(4, 8, 8, requires_grad=True)
    with determinism(True), pytest.raises(RuntimeError, match="deterministic"):
        torch.Tensor.put_(torch.zeros(3), torch.tensor([0, 0]), torch.ones(2), accumulate=False)
    with determinism(False):
        x.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",  # an inpainter is a decoder that sees more
    marked([kind for kind in KINDS if kind != "decoder"], ("inpainter", "ar_prior"), *FULL),
)
def test_what_is_compiled_is_the_same_model(world: Tiny, kind: str):
    """Traced and differentiated ahead of time, without the code generator, which takes a minute a model."""
    task, model, batch = furnished(world, world.startable(kind, **SHORT))
    made = copy.deepcopy(model)
    torch._dynamo.reset()
    compile_parts(made, "aot_eager")
    expected, found = gradient(task, model, batch), gradient(task, made, batch)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


@pytest.mark.slow
def test_a_compiled_fit_ends_near_the_plain_one(world: Tiny, tmp_path: Path):
    ends = []
    for name, how in (("eager", FitHow()), ("compiled", FitHow(compile=True))):
        train_local(world.job("prior", name, **SHORT), how, world.store, tmp_path / name, NullMonitor())
        ends.append(read_tensors(tmp_path / name / "model.safetensors"))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


BARE = """
import runpy, sys
absent = ["ray", "mlflow", "boto3", "pydantic", "open_clip", "torchvision", "diffusers", "webdataset", "img2dataset"]
sys.modules.update(dict.fromkeys(absent))
sys.argv = ["bench_loop", "--tiny", "--device", "cpu", "--eager", "--batch", "4", "--steps", "2"]
runpy.run_module("tests.gpu.bench_loop", run_name="__main__")
"""


@pytest.mark.slow
def test_the_loop_fits_whole_models_where_torch_and_pyarrow_are_all_there_is():
    done = subprocess.run([sys.executable, "-c", BARE], stdout=subprocess.PIPE, text=True, check=True)
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| base")]
    assert [(row[0].strip(), row[2].strip()) for row in rows] == [
        (f"base {kind}", how) for kind in ("decoder", "prior") for how in ("eager", "recompute")
    ]
    assert all(float(row[3]) > 0 for row in rows)


PLAIN = """
import sys
from pathlib import Path
from infra.tracking.monitor import NullMonitor
from tests.fixtures.fits import tiny
from training.telemetry import clock
from training.job import FitHow
from training.launch import train_local
world, clock.WORTHWHILE_S = tiny(Path(sys.argv[1])), 1e9
for kind in ("prior", "decoder", "upsampler"):
    job = world.job(kind, kind, steps=2, batch=4, micro=2, warmup=0, window=3)
    train_local(job, FitHow(log_seconds=0), world.store, Path(sys.argv[1]) / kind, NullMonitor())
print([name for name in ("torch._dynamo", "torch._inductor", "sympy", "torch.distributed.tensor", "open_clip", "mlflow")
       if name in sys.modules])
"""


@pytest.mark.slow
def test_a_plain_fit_imports_no_compiler(tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", PLAIN, tmp_path], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == "[]"
