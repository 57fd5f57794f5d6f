"""The page of tests/proofs/samplers.py: its cells as tables with intervals, a picture, and what follows from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluate import grids
from pipelines.shapes.oracle import judge
from pipelines.shapes.world import prompts
from tests.proofs.samplers import AGAIN, DECODER_REFERENCE, DECODER_REPEAT, GAMMA_SAMPLES, PRIOR_REFERENCE, Cell, lines
from unclip.metrics import Estimate, cmmd, coverage, frechet, paired_difference, wilson

RESAMPLES = 2000
SHOWN = (("ddpm", 250), ("ddpm", 10), ("ddpm", 4), ("ddim", 10), ("ddim", 4), ("dpm_solver_pp", 12),
         ("dpm_solver_pp", 8), ("dpm_solver_pp", 6), ("dpm_solver_pp", 4), ("analytic_dpm", 4))  # fmt: skip
PROMPTS_SHOWN = 6


@dataclass(frozen=True)
class Row:
    """A cell and what was found of it; differences are to the reference, picture by picture."""

    cell: Cell
    right: Estimate
    right_difference: Estimate
    cmmd: float
    cmmd_difference: Estimate
    fd: float
    recall: float
    cosine: float | None

    @property
    def within_noise(self) -> bool:
        """Whether neither the oracle nor CMMD can tell it from the reference to its disadvantage."""
        return self.right_difference.high >= 0 and self.cmmd_difference.low <= 0


def found(out: Path, reference: Cell) -> list[Row]:
    """A row for each finished cell of the reference's component, the fewest steps first."""
    done = lines(out)
    truth = _embeddings(out, "true-cascade" if reference.component == "cascade" else "true-decoder")
    base_right, base = done[reference]["right"], _embeddings(out, reference.name)
    rows = []
    for cell in sorted(done, key=lambda cell: (cell.seed, cell.sampler, cell.steps)):
        if cell.component != reference.component:
            continue
        right, mine = done[cell]["right"], _embeddings(out, cell.name)
        rows.append(
            Row(
                cell,
                wilson(sum(right), len(right)),
                paired_difference(right, base_right, resamples=RESAMPLES),
                cmmd(mine, truth),
                cmmd_difference(mine, base, truth),
                frechet(mine, truth),
                coverage(mine, truth).recall,
                done[cell].get("cosine"),
            )
        )
    return rows


def cmmd_difference(new: NDArray[Any], old: NDArray[Any], truth: NDArray[Any]) -> Estimate:
    """CMMD(new, truth) − CMMD(old, truth), its 95 % interval by the bootstrap over prompts; row i of each is one's."""

    def kernel(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
        a, b = (rows.astype(np.float64) / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))
        return np.exp((a @ b.T - 1) / 10.0**2)

    # What the truth has with itself is in both, and cancels.
    matrix = kernel(new, new) - kernel(old, old) - 2 * (kernel(new, truth) - kernel(old, truth))
    count = len(matrix)
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES) / count
    low, high = np.quantile(1000 * ((weights @ matrix) * weights).sum(1), (0.025, 0.975))
    return Estimate(1000 * float(matrix.mean()), float(low), float(high))


def cheapest(rows: Sequence[Row]) -> list[Row]:
    """Of each sampler the fewest steps that are within noise, as all its larger numbers of steps are; fewest first."""
    best = []
    for sampler in sorted({row.cell.sampler for row in rows}):
        mine = sorted((row for row in rows if row.cell.sampler == sampler and not row.cell.seed), key=_steps)
        good = [row for place, row in enumerate(mine) if all(later.within_noise for later in mine[place:])]
        best += good[:1]
    return sorted(best, key=_steps)


def write_page(out: Path, docs: Path, count: int) -> None:
    """Writes samplers.md and samplers.png from the cells of OUT; nothing while a reference is missing."""
    done = lines(out)
    if missing := [cell.name for cell in (DECODER_REFERENCE, PRIOR_REFERENCE) if cell not in done]:
        print(f"no page yet: {', '.join(missing)} is not done; run the same command again")
        return
    decoder, prior = found(out, DECODER_REFERENCE), found(out, PRIOR_REFERENCE)
    drawn = [(cell.steps, line) for cell, line in done.items() if cell.component == "decoder"]
    step = min(1000 * line["seconds"] / line["count"] / steps for steps, line in drawn)
    whole_reference = Cell("cascade", "ddpm", 250)
    whole = found(out, whole_reference) if whole_reference in done else []
    commit = json.loads((out / "made.json").read_text())["commit"]
    words = {
        "count": count,
        "distinct": len({one["prompt"] for one in prompts("single", count, 0)}),
        "commit": commit,
        "step": f"{step:.1f}",
        "gamma": GAMMA_SAMPLES,
        "released": ", ".join(f"{name} {how}" for name, how in json.loads((out / "released.json").read_text()).items()),
        "repeat": REPEAT if DECODER_REPEAT in done else "",
        "ceiling": f"{_true_share(out, count):.3f}",
        "decoder": _table(decoder),
        "decoder_conclusion": _conclusion("decoder", decoder),
        "prior": _table(prior),
        "prior_conclusion": _conclusion("prior", prior),
        "whole": _table(whole) if whole else "(not measured)",
    }
    (docs / "samplers.md").write_text(PAGE.format(**words), encoding="utf-8")
    grids.save(_picture(out, count), docs / "samplers.png")


def _table(rows: Sequence[Row]) -> str:
    near = any(row.cosine is not None for row in rows)
    titles = ["sampler", "steps", "all right", "minus DDPM 250", "CMMD", "minus DDPM 250", "CLIP-FD", "recall"]
    titles += ["cosine to true z_i"] * near
    text = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for row in rows:
        mark = "**" if row.within_noise else ""
        name = row.cell.sampler + (", other seeds" if row.cell.seed else "")
        cells = [
            name,
            f"{mark}{row.cell.steps}{mark}",
            f"{row.right.value:.3f} ({row.right.low:.3f}–{row.right.high:.3f})",
            _signed(row.right_difference),
            f"{row.cmmd:.3f}",
            _signed(row.cmmd_difference),
            f"{row.fd:.3f}",
            f"{row.recall:.3f}",
        ]
        cells += [] if row.cosine is None else [f"{row.cosine:.4f}"]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def _signed(value: Estimate) -> str:
    if not (value.value or value.low or value.high):
        return "0"
    return f"{value.value:+.3f} ({value.low:+.3f} to {value.high:+.3f})"


def _conclusion(component: str, rows: Sequence[Row]) -> str:
    best = cheapest(rows)
    each = ", ".join(f"{row.cell.sampler} {row.cell.steps}" for row in best) or "none"
    first = f"{component}: within noise of 250 DDPM steps, with all larger numbers of steps, from: {each}."
    worse = sorted({row.cell.sampler for row in rows} - {row.cell.sampler for row in best})
    return first + (f" No number of steps qualifies for {', '.join(worse)}." if worse else "")


def _picture(out: Path, count: int) -> Any:
    done = lines(out)
    asked = prompts("single", count, 0)
    columns = [Cell("decoder", *shown) for shown in SHOWN if Cell("decoder", *shown) in done]
    pictures = {cell: np.load(out / f"{cell.name}.npz")["pictures"] for cell in columns}
    truth = np.load(out / "true-decoder.npz")["pictures"]
    cells = []
    for number in range(PROMPTS_SHOWN):
        cells.append(grids.Cell(truth[number], asked[number]["prompt"], "true"))
        for cell in columns:
            remark = "" if done[cell]["right"][number] else "wrong"
            cells.append(grids.Cell(pictures[cell][number], f"{cell.sampler} {cell.steps}", remark))
    return grids.sheet(cells, len(columns) + 1)


def _true_share(out: Path, count: int) -> float:
    truth, asked = np.load(out / "true-decoder.npz")["pictures"], prompts("single", count, 0)
    return float(np.mean([judge(one, prompt["expected"])["all"] for one, prompt in zip(truth, asked, strict=True)]))


def _embeddings(out: Path, name: str) -> NDArray[np.float32]:
    return np.load(out / f"{name}.npz")["embeddings"]


def _steps(row: Row) -> int:
    return row.cell.steps


REPEAT = f"""
- "Other seeds" is the reference once more, with seeds from {AGAIN} on: what other noise alone changes."""
PAGE = """# Fewest steps: sampler × steps × quality

`make proof-samplers` (`python -m tests.proofs.samplers`), on a release of the recipe demo, commit {commit}, two
processes of one thread on two cores of a shared machine, no GPU. This page is written by that command.

{decoder_conclusion}

{prior_conclusion}

The release's own sampling: {released}.

## How it was measured

- {count} prompts with one object: the world's {distinct} held-out ones, each equally often, with seeds 0 to N − 1.
  Every cell has the same prompts and seeds, so the same z_i (in the decoder's table) and the same x_T; what differs is
  the sampler and its steps. Guidance and all else are the release's.
- "All right": the share of pictures in which the oracle finds shape, colour, size, background and count as asked, with
  its 95 % interval (Wilson). The oracle finds {ceiling} of true pictures of this size right.
- CMMD, CLIP-FD and recall (3 neighbours) compare CLIP embeddings of the pictures with those of as many true pictures of
  the same prompts, shrunk as the decoder's training data is.
- Differences to 250 steps of DDPM are taken picture by picture (prompt by prompt for CMMD), with 95 % intervals by the
  bootstrap. **Bold** steps are within noise: neither interval lies wholly on the worse side of 0. Each interval misses
  in 1 of 20 cases by chance; hence the demand that all larger numbers of steps agree.{repeat}
- Analytic-DPM's γ was measured over {gamma} pictures of the training list, without guidance.
- Only steps are given as the cost, since the machine did other work: each is one call of the network, and the fastest
  decoder cell took {step} ms a picture and step.

## Decoder (32 px, before the upsamplers)

{decoder}

![The same prompts and noise, by sampler and steps](samplers.png)

## Prior (its z_i drawn by the release's own decoder sampling)

{prior}

The cosine is to the embedding of one true picture of the prompt.

## The whole cascade (128 px, the decoder's pictures through the release's upsamplers)

{whole}
"""
