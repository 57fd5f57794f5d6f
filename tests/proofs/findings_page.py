"""Writes docs/findings.md and its pictures from what was drawn. What a person adds below the mark stays."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.evaluate import grids
from tests.proofs.findings import (
    ALONE,
    BOUND_STEPS,
    CONDITIONS,
    FED,
    FED_SCALES,
    FEW_STEPS,
    FIXED,
    GUIDED,
    LEARNED,
    PAIRS,
    PRIORS,
    SCALES,
    TRIPLES,
    UPSAMPLERS,
    ancestral,
    missing,
)
from tests.proofs.findings_cells import DEMO, SINGLES, Bits, Cell, Cost, Enlarged
from tests.proofs.findings_draw import BOUND_PICTURES, SECOND, read_back
from tests.proofs.findings_numbers import Numbers, precision, recall
from tests.proofs.findings_rows import findings
from tests.proofs.findings_scenes import asked
from unclip.metrics import Estimate, cmmd, cosine, frechet

MARK = "<!-- Below: by hand. Everything above is written anew by make proof-findings. -->"
COMPARED = 8
"""Pictures in a row of a sheet."""
PAIR_COLUMNS = ("colours", "relation", "objects")

OPENING = """# The paper's findings on the shapes world

`make proof-findings`, commit {commit}, on two cores of a shared machine without a GPU. It takes a store with the demo's
release, trains what is compared beside the demo's own models on the same data (`tests/proofs/findings_fits.py`), draws
{singles} held-out prompts of one object ({times} times 32 combinations), {pairs} of two and {triples} of three with the
same seeds on all sides, and writes this page.

- **Right** is the oracle's verdict on the decoder's own 32 px pictures (no upsampler): everything right at once. True
  pictures of that size: {ceilings}.
  Proportions have Wilson's 95 % intervals, differences the paired bootstrap's over prompts.
- **FD** is the Fréchet distance of raw CLIP embeddings to those of as many true pictures of the same prompts;
  **recall** and **precision** are Kynkäänniemi's (3 neighbours) between the same sets; intervals by the delete-half
  jackknife.
  Another set of true pictures has FD {fd:.0f}, recall {recall:.2f}, precision {precision:.2f}.
  The CLIP is the demo's, which also conditions the decoder: the oracle is the only judge here that is independent.
- **Spread** is the deviation of the object's place among pictures of one prompt, in thousandths of the side.
- *Yes* and *no* say on which side of 0 the difference's interval lies, *undecided* that 0 is in it. Each fit was made
  once (upsamplers twice, where two figures stand): intervals are over prompts and sampling noise, not over trainings.

Pictures: [what the decoder is fed](findings-fed.png), [guidance](findings-guidance.png),
[two and three objects](findings-binding.png).
"""


def write_page(out: Path, docs: Path) -> None:
    """findings.md, findings-fed.png, findings-guidance.png and findings-binding.png in `docs`."""
    numbers = Numbers(out)
    docs.mkdir(parents=True, exist_ok=True)
    page = docs / "findings.md"
    kept = page.read_text(encoding="utf-8").partition(MARK)[2] if page.exists() else "\n"
    text = "\n".join([_opening(numbers), *_left(out), *_findings(numbers), *_details(numbers), MARK])
    page.write_text(text + kept, encoding="utf-8")
    _pictures(numbers, docs)


def _opening(numbers: Numbers) -> str:
    second, true = (numbers.true(Cell(), seed)["embeddings"] for seed in (SECOND, 0))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    ceilings = []
    for scenes, count in (("single", SINGLES), ("pair", PAIRS), ("triple", TRIPLES)):
        pictures = numbers.true(Cell(scenes, count=count))["pictures"]
        right = read_back(pictures, asked(scenes, count))["verdicts"]["all"]
        ceilings.append(f"{scenes} {sum(right) / len(right):.3f}")
    return OPENING.format(
        commit=commit.stdout.strip() or "unknown",
        singles=SINGLES,
        times=SINGLES // 32,
        pairs=PAIRS,
        triples=TRIPLES,
        ceilings=", ".join(ceilings),
        fd=frechet(second, true),
        recall=recall(second, true),
        precision=precision(second, true),
    )


def _left(out: Path) -> Iterator[str]:
    if left := missing(out):
        fits = [name for name in left if name.startswith("fit ")]
        yield f"**Not run yet:** {', '.join(fits) or 'no training'}, and {len(left) - len(fits)} cells"
        yield "(their rows are left out; the same command goes on).\n"


def _findings(numbers: Numbers) -> Iterator[str]:
    yield "## The findings\n"
    yield from _table(
        ("finding of the paper", "where", "what was compared here", "figure", "reproduced?"), findings(numbers)
    )
    yield ""


def _details(numbers: Numbers) -> Iterator[str]:
    yield "## What the decoder is fed\n"
    fed = [(name, scale, Cell(**how, guidance=scale)) for name, how in FED.items() for scale in FED_SCALES]
    fed += [(f"{name}, no caption", 2.0, Cell(**how)) for name, how in ALONE.items()]
    yield from _table(
        ("fed", "guidance", *QUALITY),
        ([name, f"{scale:.0f}", *_quality(numbers, cell)] for name, scale, cell in fed if numbers.done(cell)),
    )
    yield "\nPairs, at guidance 2:\n"
    pairs = [(name, Cell(**how, scenes="pair", count=PAIRS)) for name, how in FED.items()]
    pairs += [(f"z_i of {prior}", Cell("pair", embedding=prior, count=PAIRS)) for prior in PRIORS[1:]]
    pairs = [(name, cell) for name, cell in pairs if numbers.done(cell)]
    yield from _table(
        ("fed", *PAIR_COLUMNS),
        (
            [name, *(brief(numbers.rate(cell, what)) for what in PAIR_COLUMNS)]
            for name, cell in pairs
            if numbers.done(cell)
        ),
    )
    yield "\n## Priors\n"
    priors = [Cell(embedding=prior, prior_guidance=scale) for prior in PRIORS for scale in (1.0, 2.0)]
    yield from _table(
        (
            "prior",
            "steps",
            "training, TFLOPs",
            "one z_i, MFLOPs",
            "guidance",
            "FD of z_i",
            "CMMD of z_i",
            "cos",
            *QUALITY,
        ),
        (_prior(numbers, cell) for cell in priors if numbers.done(cell, Cost(cell.embedding))),
    )
    yield "\nTFLOPs: of the training; MFLOPs: of drawing one z_i; cos: mean cosine of z_i and z_t.\n\n## Guidance\n"
    guided = [(name, scale, Cell(**how, guidance=scale)) for name, how in GUIDED.items() for scale in SCALES]
    yield from _table(
        ("guided", "scale", *QUALITY, "precision", "spread"),
        (
            [
                name,
                f"{scale:.0f}",
                *_quality(numbers, cell),
                brief(numbers.distance(cell, precision)),
                f"{1000 * numbers.spread(cell):.1f}",
            ]
            for name, scale, cell in guided
            if numbers.done(cell)
        ),
    )
    yield "\n## Variances\n"
    yield f"DDPM, unguided: right / FD. Bits per dimension: mean of {BOUND_PICTURES} true pictures.\n"
    kinds = [("decoder-learned", variance) for variance in LEARNED] + [(DEMO, variance) for variance in FIXED]
    yield from _table(
        (
            "network",
            "variance",
            *(f"{steps} steps" for steps in FEW_STEPS),
            *(f"bits, {steps} steps" for steps in BOUND_STEPS),
        ),
        (_variance(numbers, network, variance) for network, variance in kinds),
    )
    yield "\n## The first upsampler\n"
    enlarged = [Enlarged(name, condition) for condition in CONDITIONS for name in UPSAMPLERS]
    enlarged = [cell for cell in enlarged if numbers.done(cell)]
    yield from _table(
        ("upsampler", "condition", "right", "FD", "PSNR, dB"),
        (_enlarged(numbers, cell) for cell in enlarged),
    )
    yield ""


QUALITY = ("right", "FD", "recall")


def _quality(numbers: Numbers, cell: Any) -> list[str]:
    distances = numbers.distance(cell), numbers.distance(cell, recall)
    return [brief(numbers.rate(cell)), brief(distances[0], 0), brief(distances[1])]


def _prior(numbers: Numbers, cell: Cell) -> list[str]:
    cost, z = numbers.line(Cost(cell.embedding)), numbers.file(cell.name)["z"]
    true, text = (numbers.true(cell)[key] for key in ("z", "text"))
    return [
        cell.embedding,
        str(cost["steps"]),
        f"{cost['training'] / 1e12:.2f}",
        f"{cost['drawing'] / 1e6:.0f}",
        f"{cell.prior_guidance:.0f}",
        brief(numbers.distance(cell, key="z"), 0),
        f"{cmmd(z, true):.3f}",
        f"{cosine(z, text).mean():.3f}",
        *_quality(numbers, cell),
    ]


def _variance(numbers: Numbers, network: str, variance: str) -> list[str]:
    cells = [ancestral(network, variance, steps) for steps in FEW_STEPS]
    quality = [f"{numbers.rate(cell).value:.3f} / {numbers.distance(cell).value:.0f}" for cell in cells]
    bounds = [Bits(network, variance, steps) for steps in BOUND_STEPS]
    bits = [f"{np.mean(numbers.line(cell)['bits']):.3f}" if numbers.done(cell) else "" for cell in bounds]
    return [network, variance.replace("_", "-"), *quality, *bits]


def _enlarged(numbers: Numbers, cell: Enlarged) -> list[str]:
    psnr = numbers.line(cell).get("psnr")
    error = "" if psnr is None else f"{np.mean(psnr):.2f}"
    return [cell.upsampler, cell.condition, brief(numbers.rate(cell)), brief(numbers.distance(cell), 0), error]


def brief(value: Estimate, digits: int = 2) -> str:
    """A value with its interval, as in 0.95 (0.92–0.97)."""
    first, low, high = (f"{part:.{digits}f}" for part in value)
    return f"{first} ({low}–{high})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |\n|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _pictures(numbers: Numbers, docs: Path) -> None:
    def drawn(cell: Cell, places: Sequence[int]) -> Any:
        return numbers.file(cell.name)["pictures"][list(places)]

    first = range(COMPARED)
    fed = {"true pictures": numbers.true(Cell())["pictures"][list(first)]}
    fed |= {name: drawn(Cell(**how), first) for name, how in FED.items() if numbers.done(Cell(**how))}
    prompts = [one.prompt for one in asked("single", SINGLES)]
    same = [place for place, prompt in enumerate(prompts) if prompt == prompts[0]][:COMPARED]
    guided = {f"true pictures: {prompts[0]}": numbers.true(Cell())["pictures"][same]}
    guided |= {
        f"{name}, guidance {scale:.0f}": drawn(Cell(**how, guidance=scale), same)
        for name, how in GUIDED.items()
        for scale in (1.0, 4.0)
        if numbers.done(Cell(**how, guidance=scale))
    }
    binding = {}
    for scenes, count in (("pair", PAIRS), ("triple", TRIPLES)):
        binding[f"{scenes}: true pictures"] = numbers.true(Cell(scenes))["pictures"][list(first)]
        for name in ("z_i of the prior", "true z_i", "caption alone, decoder trained so"):
            binding[f"{scenes}: {name}"] = drawn(Cell(**FED[name], scenes=scenes, count=count), first)
    for name, sheet in (("fed", fed), ("guidance", guided), ("binding", binding)):
        grids.save(grids.rows(np.stack(list(sheet.values())), list(sheet)), docs / f"findings-{name}.png")
