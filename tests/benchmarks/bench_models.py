"""Our networks and cascade against diffusers' of the same weights: never slower, and never more memory.

Run with `make bench`. Both sides are at their best of {contiguous, channels last}; `UNCLIP_BENCH_COMPILE=1` adds
torch.compile to both (minutes more). What was measured, where, is in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.measure import MARGIN, compare, heavy_share, one_thread, peak_in_child
from tests.benchmarks.pairs import SCALES, STEPS, Cascades, Priors, UNets, backward, laid_out

DTYPES = [torch.float32, torch.bfloat16]
NAMES = ["float32", "bfloat16"]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    before = torch.get_num_threads()
    one_thread()
    yield
    torch.set_num_threads(before)


def told(what: str, share: tuple[float, float]) -> None:
    print(f"{what}: {share[0]:.0%} of our time and {share[1]:.0%} of theirs inside convolutions and products")


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_the_unet_is_not_slower_than_diffusers(dtype: torch.dtype) -> None:
    pair = UNets(dtype)
    with torch.no_grad():
        ours, theirs = pair.ours(lambda out: out), pair.theirs(lambda out: out)
        one, other = ours["channels last"]().float(), theirs["contiguous"]().float()
        assert one.std() > 1e-3
        assert (one - other).abs().max() < (1e-4 if dtype == torch.float32 else 0.1) * one.abs().max()
        found = compare(f"U-Net forward, {dtype}", ours, theirs)
        told(f"U-Net forward, {dtype}", (heavy_share(ours["channels last"]), heavy_share(theirs["channels last"])))
    assert found.ratio <= 1 + MARGIN


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_training_the_unet_is_not_slower_than_diffusers(dtype: torch.dtype) -> None:
    pair = UNets(dtype)
    ours, theirs = pair.ours(backward, fold=False), pair.theirs(backward)
    found = compare(f"U-Net forward and backward, {dtype}", ours, theirs)
    shares = heavy_share(ours["channels last"]), heavy_share(theirs["channels last"])
    told(f"U-Net forward and backward, {dtype}", shares)
    assert found.ratio <= 1 + MARGIN


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_the_prior_is_not_slower_than_diffusers(dtype: torch.dtype) -> None:
    pair = Priors(dtype)
    with torch.no_grad():
        one, other = pair.run_ours(pair.mine).float(), pair.run_theirs(pair.other).float()
        close = (1e-4 if dtype == torch.float32 else 0.1) * max(1.0, float(one.abs().max()))
        assert (one - other).abs().max() < close
        mine = {k: lambda m=m: pair.run_ours(m) for k, m in laid_out(lambda: pair.mine).items() if "last" not in k}
        other_ = {k: lambda m=m: pair.run_theirs(m) for k, m in laid_out(lambda: pair.other).items() if "last" not in k}
        found = compare(f"prior forward, {dtype}", mine, other_)
        told(f"prior forward, {dtype}", (heavy_share(mine["contiguous"]), heavy_share(other_["contiguous"])))
        memory = pair.mine.read(pair.mine.context(*pair.context))
        assert (pair.mine.resume(pair.z, pair.t, memory).float() - other).abs().max() < close
        step = {"contiguous": lambda: pair.mine.resume(pair.z, pair.t, memory)}
        step_found = compare(f"prior, a step of a sampling, {dtype}", step, other_)
    assert found.ratio <= 1 + MARGIN
    assert step_found.ratio <= 0.9


def test_sampling_is_not_slower_than_diffusers(tmp_path: Path) -> None:
    """Text to pictures: CLIP, prior, decoder and upsampler, 25, 25 and 7 steps of DDPM, guidance 4 and 8."""
    pair = Cascades(tmp_path / "diffusers")
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    # The networks agree to 2e-6; the noisiest step of UnCLIPScheduler, whose tables are float32, is 4e-4 off ours, and
    # networks that were never trained make of it a few other pixels: so few steps, weak guidance, and a mean.
    pair.steps, pair.scales = {"prior": 5, "decoder": 6, "upsampler-128": 4}, {"prior": 3.0, "decoder": 2.0}
    first, second = pair.run_ours().float(), pair.run_theirs().float()
    assert first.std() > 10
    assert (first - second).abs().mean() < 1
    pair.steps, pair.scales = STEPS, SCALES
    for name, layout in (("contiguous", torch.contiguous_format), ("channels last", torch.channels_last)):

        def laid(run: Any, layout: Any = layout) -> Any:
            def call() -> None:
                pair.layout(layout)
                run()

            return call

        ours[name], theirs[name] = laid(pair.run_ours), laid(pair.run_theirs)
    found = compare("sampling from text, float32", ours, theirs, least=3)
    told("sampling from text", (heavy_share(ours["channels last"]), heavy_share(theirs["channels last"])))
    assert found.ratio <= 1 + MARGIN


@pytest.mark.parametrize(
    ("what", "dtype"),
    [(what, name) for what in ("unet-forward", "unet-training", "prior") for name in NAMES] + [("sampling", "float32")],
)
def test_no_more_memory_than_diffusers(what: str, dtype: str) -> None:
    """Beyond the weights, which are the same; one call at its peak, channels last."""
    mine, other = (peak_in_child("tests.benchmarks.pairs", what, side, dtype) for side in ("ours", "theirs"))
    print(f"\npeak memory beyond the weights, {what}, {dtype}: {mine / other:.2f} of diffusers' "
          f"({mine / 2**20:.0f} MiB against {other / 2**20:.0f})")  # fmt: skip
    assert mine <= other * (1 + MARGIN)
