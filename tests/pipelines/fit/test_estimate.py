"""What a plan says of the machine, against arithmetic by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.errors import Refused
from pipelines.fit.estimate import Accelerator, Need, needs, span
from pipelines.recipe import schema as recipe
from pipelines.recipe.stages import Inputs, stages

CARD = "hardware={X: {tflops: 0.001, memory_gib: 1, hourly: 3, reached: 0.5}}"


def made(*changes: str) -> list[Need]:
    read = recipe.load("tiny", changes)
    prompts = Path(recipe.FOLDER / "prompts.jsonl")
    return needs(stages(read, Inputs("list.parquet", ("0" * 64,), str(prompts), None)), read.hardware)


def test_time_and_price_follow_from_operations_samples_and_devices():
    for need in made(CARD, "decoder.workers=2"):
        time = need.on["X"]
        assert need.devices == (2 if need.stage == "decoder" else 1)
        assert time.hours == pytest.approx(need.flops * need.samples / need.devices / (1e9 * 0.5) / 3600)
        assert time.price == pytest.approx(3 * need.devices * time.hours)
    assert {need.stage: need.samples for need in made()}["decoder"] == 20 * 8


def test_a_worker_holds_a_micro_batch_but_a_contrastive_one_its_whole_share():
    def memory(*changes: str) -> dict[str, int]:
        return {need.stage: need.memory for need in made(*changes)}

    whole, halves = memory(), memory("decoder.train.micro=4", "clip.train.micro=16")
    assert halves["decoder"] < whole["decoder"]
    assert halves["clip"] == whole["clip"]
    assert memory("clip.train.micro=16", "clip.workers=2")["clip"] < whole["clip"]


def test_what_does_not_fit_is_said():
    small = "hardware={X: {tflops: 1, memory_gib: 0.0001}}"
    assert not any(need.on["X"].fits for need in made(small))
    assert all(need.on["X"].fits for need in made(CARD))


@pytest.mark.parametrize(
    "wrong", ["{tflops: 0, memory_gib: 1}", "{tflops: 1, memory_gib: 1, reached: 1.5}", "{tflops: 1}"]
)
def test_an_impossible_accelerator_is_refused_with_its_place(wrong: str):
    with pytest.raises(Refused, match=r"hardware\.X"):
        recipe.load("tiny", [f"hardware={{X: {wrong}}}"])


def test_spans_are_read_at_a_glance():
    assert [span(hours) for hours in (0.002, 0.5, 3, 72)] == ["7 s", "30 min", "3.0 h", "3.0 days"]
    assert Accelerator(1, 1).hourly == 0
