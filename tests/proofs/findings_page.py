"""Writes docs/findings.md and its pictures from what was drawn. What a person adds below the mark stays."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines import grids
from tests.proofs.findings import (
    BOUND_STEPS,
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
)
from tests.proofs.findings_draw import BLUR, BOUND_PICTURES, DEMO, SINGLES, Bits, Cell, Cost, Enlarged, Words
from tests.proofs.findings_numbers import Numbers, above, below, precision, recall, told
from tests.proofs.findings_scenes import asked
from unclip.metrics import Estimate, cmmd, cosine, frechet, paired_difference, wilson

MARK = "<!-- Below: by hand. Everything above is written anew by make proof-findings. -->"
STRONG = 4.0
"""The guidance scale at which diversity is compared with that of no guidance."""
PAPER_STEPS = 25
"""Steps of DDPM at which the variances are compared in the table of findings."""
COMPARED = 8
"""Pictures in a row of a sheet."""


class Row(NamedTuple):
    """One finding."""

    finding: str
    where: str
    compared: str
    figures: str
    reproduced: str


def write_page(out: Path, docs: Path) -> None:
    """findings.md, findings-fed.png, findings-guidance.png and findings-binding.png in `docs`."""
    numbers = Numbers(out)
    docs.mkdir(parents=True, exist_ok=True)
    page = docs / "findings.md"
    kept = page.read_text(encoding="utf-8").partition(MARK)[2] if page.exists() else "\n"
    text = "\n".join([*_opening(numbers), *_findings(numbers), *_details(numbers), MARK])
    page.write_text(text + kept, encoding="utf-8")
    _pictures(numbers, docs)


def _opening(numbers: Numbers) -> Iterator[str]:
    true, second = numbers.file("true,scenes=single,seed=0"), numbers.file("true,scenes=single,seed=2")
    pair = (second["embeddings"], true["embeddings"])
    seconds = sum(line["seconds"] for line in numbers.lines.values())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    yield f"""# The paper's findings on the shapes world

`make proof-findings` (commit {commit.stdout.strip() or "unknown"}; {seconds / 3600:.1f} hours of one thread, two at a time, on a shared machine of two
cores without a GPU). It takes the demo's store, trains what is compared beside the demo's own models on the same data
(`tests/proofs/findings_fits.py`), draws {SINGLES} held-out prompts of one object ({SINGLES // 32} times 32 combinations), {PAIRS} of two and {TRIPLES} of
three with the same seeds on all sides, and writes this page from what it found.

- **Right** is the oracle's verdict on the decoder's own 32 px pictures (no upsampler): everything right at once.
  Proportions have Wilson's 95 % intervals, differences the paired bootstrap's over prompts.
- **FD** is the Fréchet distance of raw CLIP embeddings to those of {SINGLES} true pictures of the same prompts, **recall** and
  **precision** are Kynkäänniemi's (3 neighbours) between the same sets. Their intervals are the delete-half jackknife's.
  CLIP is the demo's, which also conditions the decoder: there is no judge here that is independent of it but the oracle.
- **Spread** is the deviation of the object's place among pictures of one prompt, as a share of the side.
- Another set of true pictures of the same prompts has FD {frechet(*pair):.0f}, recall {recall(*pair):.2f}, precision {precision(*pair):.2f}.
- *Yes* and *no* say on which side of 0 the interval of the difference lies, *undecided* that 0 is in it. Each fit was
  made once, except the upsamplers (twice): the intervals are over prompts and seeds of sampling, not over trainings.
"""


def _findings(numbers: Numbers) -> Iterator[str]:
    yield "## The findings\n"
    yield "| finding of the paper | where | what was compared here | figure | reproduced? |\n|---|---|---|---|---|"
    for row in (*_fed(numbers), *_priors(numbers), *_guided(numbers), *_variances(numbers), *_upsampled(numbers),
                *_binding(numbers)):  # fmt: skip
        yield "| " + " | ".join(row) + " |"
    yield ""


# Rows ---------------------------------------------------------------------------------------------------------------


def _best(numbers: Numbers, how: dict[str, Any]) -> Cell:
    """Of a way to feed the decoder the guidance scale with the least FD: the paper sweeps it for each."""
    cells = [Cell(**how, guidance=scale) for scale in FED_SCALES]
    return min(cells, key=lambda cell: numbers.distance(cell).value)


def _fed(numbers: Numbers) -> Iterator[Row]:
    prior = _best(numbers, FED["z_i of the prior"])
    said = {
        "z_t, as long as a z_i": "the prior's z_i is better than z_t fed to the same decoder",
        "z_t, decoder trained on z_t": "the prior's z_i is better than a decoder trained on z_t",
        "caption alone": "the prior's z_i is better than the caption alone, z_i dropped",
        "caption alone, decoder trained so": "diversity and fidelity beside a decoder of captions alone (GLIDE)",
    }
    for name, finding in said.items():
        other = _best(numbers, FED[name])
        fd, pair = numbers.nearer(prior, other), _more_of_pairs(numbers, FED["z_i of the prior"], FED[name])
        figures = (
            f"FD {numbers.distance(prior).value:.0f} against {numbers.distance(other).value:.0f}: "
            f"{told(fd, 0, True)}; right {told(numbers.more(prior, other), sign=True)}; "
            f"pairs' colours {told(pair, sign=True)}"
        )
        where = "5.1, figure 8" if "GLIDE" not in finding else "5.2, 5.3"
        compared = f"z_i of the prior − {name}; each at its best guidance of 1, 2, 4 (pairs at 2)"
        yield Row(finding, where, compared, figures, f"FD {below(fd)}, colours {above(pair)}")
    dropped, trained = _best(numbers, FED["caption alone"]), _best(numbers, FED["caption alone, decoder trained so"])
    fd = numbers.nearer(dropped, trained)
    yield Row(
        "with z_i dropped, unCLIP's decoder underperforms one trained on captions alone",
        "5.1",
        "caption alone: the demo's decoder − one trained so",
        f"FD {told(fd, 0, True)}; right {told(numbers.more(dropped, trained), sign=True)}",
        above(fd),
    )


def _more_of_pairs(numbers: Numbers, new: dict[str, Any], old: dict[str, Any]) -> Estimate:
    return numbers.more(*(Cell(**how, scenes="pair", count=PAIRS) for how in (new, old)), attribute="colours")


def _priors(numbers: Numbers) -> Iterator[Row]:
    for diffusion, autoregressive, budget in ((DEMO, "ar-prior", "the demo's"), ("prior-long", "ar-prior-long", "twice")):
        new, old = Cell(embedding=diffusion), Cell(embedding=autoregressive)
        z, fd = numbers.nearer(new, old, key="z"), numbers.nearer(new, old)
        pair = _more_of_pairs(numbers, {"embedding": diffusion}, {"embedding": autoregressive})
        yield Row(
            "at comparable size and less compute the diffusion prior is better than the autoregressive one",
            "2.2, 5.2, tables 1 and 2",
            f"diffusion − autoregressive at equal training FLOPs ({budget} budget), the same decoder",
            f"FD of z_i {told(z, 0, True)}; FD of pictures {told(fd, 0, True)}; right "
            f"{told(numbers.more(new, old), sign=True)}; pairs' colours {told(pair, sign=True)}",
            f"z_i {below(z)}, pictures {below(fd)}",
        )


def _guided(numbers: Numbers) -> Iterator[Row]:
    def change(how: str) -> list[tuple[int, Cell]]:
        return [(1, Cell(**GUIDED[how], guidance=STRONG)), (-1, Cell(**GUIDED[how], guidance=1.0))]

    ours, glide = change("z_i and caption"), change("caption alone, trained so")
    alone, words = change("z_i alone"), change("caption alone")
    kept, lost = numbers.combined(ours, recall), numbers.combined(glide, recall)
    between = numbers.combined([*ours, *((-sign, cell) for sign, cell in glide)], recall)
    yield Row(
        "guidance costs unCLIP little diversity, and a model of captions much",
        "5.3, figures 9 and 10",
        f"change of recall from guidance 1 to {STRONG:.0f}: z_i and caption − a decoder of captions alone",
        f"{told(kept, 2, True)} against {told(lost, 2, True)}: {told(between, 2, True)}",
        above(between),
    )
    image, caption = numbers.combined(alone, recall), numbers.combined(words, recall)
    between = numbers.combined([*alone, *((-sign, cell) for sign, cell in words)], recall)
    yield Row(
        "the same within one decoder: z_i guided, or the caption guided",
        "5.3",
        f"change of recall from guidance 1 to {STRONG:.0f}: z_i alone − caption alone, the demo's decoder",
        f"{told(image, 2, True)} against {told(caption, 2, True)}: {told(between, 2, True)}",
        above(between),
    )
    finer = numbers.more(Cell(), Cell(guidance=1.0))
    exact = numbers.nearer(Cell(), Cell(guidance=1.0), precision)
    yield Row(
        "guidance raises fidelity",
        "5.3, figure 11",
        "guidance 2 − 1, z_i and caption",
        f"right {told(finer, sign=True)}; precision {told(exact, 2, True)}",
        f"right {above(finer)}, precision {above(exact)}",
    )


def _variances(numbers: Numbers) -> Iterator[Row]:
    for variance in FIXED:
        new, old = (ancestral("decoder-learned", which, PAPER_STEPS) for which in ("learned_range", variance))
        fd = numbers.nearer(new, old)
        few = [ancestral("decoder-learned", which, FEW_STEPS[0]) for which in ("learned_range", variance)]
        fewest = numbers.nearer(*few)
        yield Row(
            f"learned variances are better than {variance.replace('_', '-')} at few steps",
            "appendix C; Nichol & Dhariwal 2021, section 4",
            f"DDPM, one network, learned − {variance.replace('_', '-')}, {PAPER_STEPS} and {FEW_STEPS[0]} steps",
            f"FD {told(fd, 0, True)} and {told(fewest, 0, True)}; right {told(numbers.more(new, old), sign=True)} "
            f"and {told(numbers.more(*few), sign=True)}",
            f"{below(fd)} and {below(fewest)}",
        )
    bits = [numbers.line(Bits("decoder-learned", which, PAPER_STEPS))["bits"] for which in LEARNED]
    better = paired_difference(bits[0], np.minimum(bits[1], bits[2]))
    yield Row(
        "learned variances lower the bound",
        "Nichol & Dhariwal 2021, section 3",
        f"bits per dimension over {PAPER_STEPS} steps, one network, learned − the better fixed one of each picture",
        told(better, 3, True),
        below(better),
    )


def _upsampled(numbers: Numbers) -> Iterator[Row]:
    both = ((DEMO, "upsampler-plain"), ("upsampler-again", "upsampler-plain-again"))
    drawn = [tuple(Enlarged(name) for name in names) for names in both]
    fds = [numbers.nearer(*cells) for cells in drawn]
    yield Row(
        "conditions corrupted in training make an upsampler robust",
        "2.1",
        "32 → 64 of the decoder's pictures: trained with blur − without, two seeds",
        f"FD {' and '.join(told(fd, 1, True) for fd in fds)}; right "
        f"{' and '.join(told(numbers.more(*cells), sign=True) for cells in drawn)}",
        " and ".join(below(fd) for fd in fds),
    )
    for condition, sign in (("blurred", above), ("clean", below)):
        psnr = [
            paired_difference(*(numbers.line(Enlarged(name, condition))["psnr"] for name in names)) for names in both
        ]
        yield Row(
            f"the same, {condition} conditions" + (" (the price)" if condition == "clean" else ""),
            "2.1",
            f"32 → 64 of {condition} true pictures" + (f" (σ {BLUR} px)" if condition == "blurred" else ""),
            f"PSNR in dB {' and '.join(told(one, 2, True) for one in psnr)}",
            " and ".join(sign(one) for one in psnr),
        )


def _binding(numbers: Numbers) -> Iterator[Row]:
    wanted = [one.expected for one in asked("pair", PAIRS)]

    def bound(how: dict[str, Any]) -> str:
        own, other, _ = numbers.bound_shapes(Cell(**how, scenes="pair", count=PAIRS), wanted)
        return f"{told(wilson(own, own + other), 2)} of {own + other}"

    ours = Cell(scenes="pair", count=PAIRS)
    right = numbers.rate(ours, "objects")
    own, other, _ = numbers.bound_shapes(ours, wanted)
    share = wilson(own, own + other)
    verdict = "no" if share.low > 0.9 else "yes" if share.low <= 0.5 <= share.high or share.high < 0.9 else "undecided"
    yield Row(
        "attributes are bound badly: two objects",
        "7, figures 14 and 15",
        "held-out pairs; of objects with a wanted colour and one of the two wanted shapes, the share with their own "
        "shape and not the other's (unbound: .5)",
        f"both objects right {told(right)}; own shape {bound({})}; from a true z_i {bound(FED['true z_i'])}; "
        f"decoder of captions {bound(FED['caption alone, decoder trained so'])}",
        verdict,
    )
    glide = Cell(**FED["caption alone, decoder trained so"], scenes="pair", count=PAIRS)
    place = numbers.more(ours, glide, "relation")
    yield Row(
        "a decoder of captions alone binds better than unCLIP",
        "7, figure 14",
        "held-out pairs, z_i of the prior − a decoder of captions alone: the two objects lie as the caption says",
        f"{told(numbers.rate(ours, 'relation'))} against {told(numbers.rate(glide, 'relation'))}: {told(place, 3, True)}",
        below(place),
    )
    words = numbers.line(Words())
    shares = {what: wilson(sum(words[what]), len(words[what])) for what in ("colours", "relation")}
    yield Row(
        "… since CLIP's embedding does not bind them",
        "7",
        "true pictures of pairs: CLIP prefers the caption to the one with exchanged colours, with the converse relation "
        "(chance: .5)",
        f"colours {told(shares['colours'])}; relation {told(shares['relation'])}",
        "colours " + ("yes" if shares["colours"].low <= 0.5 else "no")
        + ", relation " + ("yes" if shares["relation"].low <= 0.5 else "no"),
    )  # fmt: skip
    triples = {
        name: Cell("triple", decoder, embedding, count=TRIPLES)
        for name, decoder, embedding in (
            ("prior", DEMO, DEMO),
            ("true z_i", DEMO, "true"),
            ("captions alone", "decoder-caption", "none"),
        )
    }
    three = {name: numbers.rate(cell, "objects") for name, cell in triples.items()}
    counted = "; ".join(f"{name}: {told(numbers.rate(cell, 'count'))}" for name, cell in triples.items())
    yield Row(
        "attributes are bound badly: three objects",
        "7",
        "captions and scenes of a kind that training never had: all three objects are there, each with its own colour",
        f"{'; '.join(f'{name}: {told(rate)}' for name, rate in three.items())}. Three objects of any kind: {counted}",
        "yes, but out of training's range" if three["prior"].high < 0.5 else "no",
    )
    yield Row("spelling fails", "7, figure 16", "the shapes world has no glyphs", "–", "not measured")


# Details ------------------------------------------------------------------------------------------------------------


def _details(numbers: Numbers) -> Iterator[str]:
    yield "## What the decoder is fed\n"
    yield from _table(
        ("fed", "guidance", "right", "FD", "recall", "pairs: colours", "pairs: relation", "pairs: two objects"),
        (
            [name if scale == FED_SCALES[0] else "", f"{scale:.0f}", *_quality(numbers, Cell(**how, guidance=scale))]
            + (
                [told(numbers.rate(Cell(**how, scenes="pair", count=PAIRS), what)) for what in PAIR_COLUMNS]
                if scale == 2
                else [""] * 3
            )
            for name, how in FED.items()
            for scale in FED_SCALES
        ),
    )
    yield "\n## Priors\n"
    yield f"{_budget(numbers)}.\n"
    yield from _table(
        ("prior", "its guidance", "FD of z_i", "CMMD of z_i", "cos(z_i, z_t) of z_i", "right", "FD", "recall"),
        (
            [prior, f"{scale:.0f}", *_of_z(numbers, Cell(embedding=prior, prior_guidance=scale))]
            + _quality(numbers, Cell(embedding=prior, prior_guidance=scale))
            for prior in PRIORS
            for scale in (1.0, 2.0)
        ),
    )
    yield "\n## Guidance\n"
    yield from _table(
        ("guided", "scale", "right", "FD", "recall", "precision", "spread"),
        (
            [name if scale == SCALES[0] else "", f"{scale:.0f}", *_quality(numbers, cell)]
            + [told(numbers.distance(cell, precision), 2), f"{numbers.spread(cell):.4f}"]
            for name, how in GUIDED.items()
            for scale in SCALES
            for cell in [Cell(**how, guidance=scale)]
        ),
    )
    yield "\n## Variances\n"
    kinds = [("decoder-learned", variance) for variance in LEARNED] + [(DEMO, variance) for variance in FIXED]
    yield "DDPM, unguided: right / FD. Bits per dimension: mean of " + f"{BOUND_PICTURES} true pictures.\n"
    yield from _table(
        ("network", "variance", *(f"{steps} steps" for steps in FEW_STEPS), "bits, 25 steps", "bits, 100 steps"),
        (
            [network, variance]
            + [f"{numbers.rate(cell).value:.3f} / {numbers.distance(cell).value:.0f}"
               for cell in (ancestral(network, variance, steps) for steps in FEW_STEPS)]
            + [f"{np.mean(numbers.line(Bits(network, variance, steps))['bits']):.3f}" for steps in (25, 100)]
            for network, variance in kinds
        ),
    )  # fmt: skip
    yield "\n## The first upsampler\n"
    yield from _table(
        ("upsampler", "condition", "right", "FD", "PSNR, dB"),
        (
            [name, condition, told(numbers.rate(cell)), f"{numbers.distance(cell).value:.1f}",
             f"{np.mean(numbers.line(cell)['psnr']):.2f}" if "psnr" in numbers.line(cell) else ""]
            for condition in ("drawn", "clean", "blurred")
            for name in UPSAMPLERS
            for cell in [Enlarged(name, condition)]
        ),
    )  # fmt: skip
    yield ""


PAIR_COLUMNS = ("colours", "relation", "objects")


def _quality(numbers: Numbers, cell: Cell) -> list[str]:
    return [told(numbers.rate(cell)), told(numbers.distance(cell), 0), told(numbers.distance(cell, recall), 2)]


def _of_z(numbers: Numbers, cell: Cell) -> list[str]:
    z, true = numbers.file(cell.name)["z"], numbers.true(cell)["z"]
    return [told(numbers.distance(cell, key="z"), 0), f"{cmmd(z, true):.4f}", f"{cosine(z, true).mean():.4f}"]


def _budget(numbers: Numbers) -> str:
    costs = {prior: numbers.line(Cost(prior)) for prior in PRIORS}
    return "; ".join(
        f"{prior}: {cost['steps']} steps, {cost['training'] / 1e12:.2f} TFLOPs of training, "
        f"{cost['drawing'] / 1e6:.0f} MFLOPs for one z_i"
        for prior, cost in costs.items()
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |\n|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


# Pictures -----------------------------------------------------------------------------------------------------------


def _pictures(numbers: Numbers, docs: Path) -> None:
    def row(cell: Any, places: Sequence[int]) -> Any:
        return numbers.file(cell.name)["pictures"][list(places)]

    first = range(COMPARED)
    prompts = [one.prompt for one in asked("single", SINGLES)]
    same = [place for place, prompt in enumerate(prompts) if prompt == prompts[0]][:COMPARED]
    fed = {name: row(Cell(**how), first) for name, how in FED.items()}
    guided = {
        f"{name}, guidance {scale:.0f}": row(Cell(**how, guidance=scale), same)
        for name, how in GUIDED.items()
        for scale in (1.0, SCALES[-1])
    }
    guided = {f"true pictures: {prompts[0]}": numbers.true(Cell())["pictures"][same], **guided}
    binding = {
        f"{scenes}: {name}": row(Cell(scenes=scenes, count=count, **how), first)
        for scenes, count in (("pair", PAIRS), ("triple", TRIPLES))
        for name, how in FED.items()
        if name in ("z_i of the prior", "true z_i", "caption alone, decoder trained so")
    }
    for scenes in ("triple", "pair"):
        true = numbers.file(f"true,scenes={scenes},seed=0")["pictures"][: len(first)]
        binding = {f"{scenes}: true pictures": true, **binding}
    for name, sheet in (("fed", fed), ("guidance", guided), ("binding", dict(sorted(binding.items())))):
        image = grids.rows(np.stack(list(sheet.values())), list(sheet)).quantize(128)
        grids.save(image, docs / f"findings-{name}.png")
