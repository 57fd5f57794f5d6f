"""What is drawn while a model trains: always the same, by its average, and without a trace in what is trained."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from infra.errors import Stopped
from tests.fixtures.cells import marked
from tests.fixtures.fits import Tiny, tiny
from tests.training.test_loop import HOW, SHORT, Seen, case, contents, stopping_after
from training.data.batches import Data
from training.job import FitHow, Job
from training.launch import train_local
from training.objectives.base import Objective
from training.objectives.choice import objective
from training.optim.precision import Precision
from training.parallel.modes import compile_parts, recompute
from training.telemetry.preview import GUIDANCE, NAME, STEPS, Previews
from unclip.clip.text import Text
from unclip.diffusion.guidance import classifier_free, clip_x0
from unclip.diffusion.samplers import ddim, noise_for
from unclip.diffusion.settings import Sampling
from unclip.pictures import to_uint8
from unclip.release.model import load_model
from unclip.sample import sample_embeddings

CPU = torch.device("cpu")
ALWAYS = FitHow(checkpoint_seconds=1000, log_seconds=0, preview_share=1)
TEXT = ("text_embedding", "text_states", "text_mask")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def data(world: Tiny) -> Callable[[Job], tuple[Objective, Data]]:
    def made(job: Job) -> tuple[Objective, Data]:
        task = objective(job, world.store, CPU)
        return task, Data(world.store, job.data["rows"], job.data["selection"], task.reads, read_text=task.read_text)

    return made


def drawn_at_each_step(job: Job, world: Tiny, out: Path, seen: Seen, **more: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Previews, "due", lambda previews: True)
        train_local(job, ALWAYS, world.store, out, seen, **more)


@pytest.mark.parametrize(
    "name", marked(["prior", "ar_prior", "muon", "glide", "upsampler"], ["prior"], pytest.mark.slow)
)
def test_drawing_at_each_step_changes_no_byte_of_the_model(world: Tiny, tmp_path: Path, name: str) -> None:
    seen, shown, blind = Seen(), case(world, name, f"shown-{name}"), case(world, name, f"blind-{name}")
    for job in (shown, blind):
        job.train["steps"] = 4
    drawn_at_each_step(shown, world, tmp_path / "shown", seen)
    train_local(blind, FitHow(checkpoint_seconds=1000, preview_share=0), world.store, tmp_path / "blind", Seen())
    assert contents(tmp_path / "shown") == contents(tmp_path / "blind")
    if name.endswith("prior"):
        told = [values for values in seen.values if f"{NAME}/cosine" in values]
        assert len(told) == 4
        assert all(-1 <= value <= 1 for values in told for value in values.values())
    else:
        assert sorted(seen.images) == [1, 2, 3, 4]


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


@pytest.mark.slow
def test_a_decoders_last_picture_is_what_its_released_average_draws(world: Tiny, tmp_path: Path, data: Any) -> None:
    seen = Seen()
    job = world.job("decoder", "average", **SHORT | {"lr": 0.02, "steps": 8})
    drawn_at_each_step(job, world, tmp_path, seen)
    model, side = load_model(tmp_path, "decoder").eval(), 16
    rows = data(job)[1].batch([(0, row) for row in range(3)], 0).tensors  # as many as a micro-batch
    with torch.no_grad():
        context = model.context(*(rows[name] for name in ("image_embedding", *TEXT)))
        denoise = classifier_free(model.denoise, context, model.null_context(3), GUIDANCE)
        noise = noise_for(range(3), (3, side, side), stream=NAME)(0)
        drawn = to_uint8(ddim(clip_x0(denoise, model.schedule), noise, model.schedule.respace(STEPS)))
    sheet = pixels(seen.images[8])[:: 64 // side, :: 64 // side]
    expected = torch.cat([torch.cat([*rows["image"]], 2), torch.cat([*drawn], 2)], 1)
    assert np.array_equal(sheet, expected.permute(1, 2, 0))
    assert not np.array_equal(pixels(seen.images[1]), pixels(seen.images[8]))


@pytest.mark.slow
def test_after_a_resume_the_same_rows_are_drawn_from_the_same_noise(world: Tiny, tmp_path: Path) -> None:
    whole, parts = Seen(), Seen()
    drawn_at_each_step(world.job("upsampler", "whole", **SHORT | {"steps": 5}), world, tmp_path / "whole", whole)
    job = world.job("upsampler", "parts", **SHORT | {"steps": 5})
    with pytest.raises(Stopped):
        drawn_at_each_step(job, world, tmp_path, parts, lease_number=1, stop=stopping_after(2))
    drawn_at_each_step(job, world, tmp_path / "parts", parts, lease_number=2)
    assert parts.images == {step: image for step, image in whole.images.items() if step in parts.images}
    assert set(whole.images) - set(parts.images) == {3}  # at which it was asked to stop


@pytest.mark.slow
def test_previews_keep_to_their_share_of_the_time(world: Tiny, tmp_path: Path) -> None:
    seen = Seen()
    job = world.job("prior", "share", **SHORT | {"steps": 200})
    train_local(job, FitHow(log_seconds=0, preview_share=0.2), world.store, tmp_path, seen)
    steps = [values for values in seen.values if "loss" in values]
    spent = sum(values.get("time/preview", 0) / values["samples_per_s"] for values in steps)
    assert len(seen.values) - len(steps) > 1
    first = next(number for number, values in enumerate(steps) if "time/preview" in values)
    assert first >= 14  # told with the report after: 16 passes of 3 rows are 2.7 steps of 6 samples, a fifth of 13.3
    assert 0.02 < spent / sum(1 / values["samples_per_s"] for values in steps) < 0.25


def test_a_preview_that_fails_is_the_last_and_training_goes_on(
    world: Tiny, data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(Seen):
        def image(self, stage: str, data: bytes, name: str, step: int) -> None:
            raise MemoryError("no room")

    job = world.job("upsampler", "fails", **SHORT)
    task, rows = data(job)
    model = task.build().train()
    previews = Previews(job, replace(HOW, preview_share=1), task, model, rows, Full(), Precision("float32", CPU))
    previews.show(1, dict(model.state_dict()))
    assert "no more previews: MemoryError: no room" in caplog.text
    assert not previews.due()
    assert model.training


def test_a_priors_cosine_is_that_of_its_samples_to_the_rows_embeddings(world: Tiny, data: Any) -> None:
    seen = Seen()
    job = world.job("prior", "cosine", **SHORT)
    task, rows = data(job)
    model = task.build().train()
    Previews(job, HOW, task, model, rows, seen, Precision("float32", CPU)).show(1, dict(model.state_dict()))
    told = rows.batch([(0, row) for row in range(3)], 0).tensors
    z = sample_embeddings(model.eval(), Text(*(told[name] for name in TEXT)), range(3), Sampling("ddim", steps=STEPS))
    expected = F.cosine_similarity(z, told["image_embedding"]).mean()
    assert seen.values[-1][f"{NAME}/cosine"] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.slow
def test_a_model_that_is_compiled_or_computed_twice_draws_the_same_without_a_compiler(world: Tiny, data: Any) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise AssertionError("a preview was compiled")

    job = world.job("decoder", "modes", **SHORT)
    task, rows = data(job)
    drawn = []
    for how in (HOW, replace(HOW, recompute=True), replace(HOW, compile=True)):
        seen = Seen()
        torch.manual_seed(0)
        model = task.build().train()
        if how.recompute:
            recompute(model)
        if how.compile:
            compile_parts(model, backend)
        Previews(job, how, task, model, rows, seen, Precision("float32", CPU)).show(1, dict(model.state_dict()))
        drawn.append(seen.images[1])
    assert drawn[0] == drawn[1] == drawn[2]
