"""The findings as rows: what the paper says, what was compared here, the figure, and whether it came out so."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from tests.proofs.findings import (
    ALONE,
    CONDITIONS,
    FED,
    FED_SCALES,
    FEW_STEPS,
    FIXED,
    GUIDED,
    LEARNED,
    PAIRS,
    TRIPLES,
    ZERO_SHOT,
    ancestral,
)
from tests.proofs.findings_cells import DEMO, Bits, Cell, Enlarged, Words
from tests.proofs.findings_draw import BLUR
from tests.proofs.findings_numbers import Numbers, above, below, precision, recall, told
from tests.proofs.findings_scenes import asked
from unclip.metrics import Estimate, paired_difference, wilson

STRONG = (2.0, 4.0)
"""The guidance scales at which diversity is compared with that of no guidance: the demo's, and a strong one."""
BOUND = 0.9
"""A share of right bindings above which one may speak of binding."""
PAPER_STEPS = 25
"""Steps of DDPM at which the variances are compared, beside the fewest."""


class Row(NamedTuple):
    """One finding."""

    finding: str
    where: str
    compared: str
    figures: str
    reproduced: str


def findings(numbers: Numbers) -> Iterator[Row]:
    """All rows, in the order of the paper."""
    yield from _fed(numbers)
    yield from _priors(numbers)
    yield from _guided(numbers)
    yield from _variances(numbers)
    yield from _upsampled(numbers)
    yield from _binding(numbers)


AGAINST = (
    ("the prior's z_i is better than z_t fed to the same decoder", "5.1", ZERO_SHOT),
    ("the prior's z_i is better than a decoder trained on z_t", "5.1", ("z_t, decoder trained on z_t",)),
    ("the prior's z_i is better than the caption alone, z_i dropped", "5.1, figure 8", ("caption alone",)),
    ("unCLIP is at least as good as a decoder of captions (GLIDE)", "5.2, 5.4", ("caption alone, decoder trained so",)),
)
"""Finding, where, and what stands on the other side."""


def _best(numbers: Numbers, *names: str) -> tuple[str, Cell]:
    """Of ways to feed the decoder the one, and its guidance scale, with the least FD: the paper sweeps it for each."""
    cells = [(name, Cell(**FED[name], guidance=scale)) for name in names for scale in FED_SCALES]
    return min(cells, key=lambda named: numbers.distance(named[1]).value)


def _fed(numbers: Numbers) -> Iterator[Row]:
    _, prior = _best(numbers, "z_i of the prior")
    for finding, where, names in AGAINST:
        if not numbers.done(*(Cell(**FED[name], guidance=scale) for name in names for scale in FED_SCALES)):
            continue
        name, other = _best(numbers, *names)
        fd, pair = numbers.nearer(prior, other), _more_of_pairs(numbers, FED["z_i of the prior"], FED[name])
        figures = (
            f"FD {numbers.distance(prior).value:.0f} against {numbers.distance(other).value:.0f}: "
            f"{told(fd, 0, True)}; right {told(numbers.more(prior, other), sign=True)}; "
            f"pairs' colours {told(pair, sign=True)}"
        )
        chosen = f" (the best of {len(names)} ways)" if len(names) > 1 else ""
        compared = f"z_i of the prior − {name}{chosen}; each at its best guidance of 1, 2, 4 (pairs at 2)"
        yield Row(finding, where, compared, figures, f"FD {below(fd)}, colours {above(pair)}")
    ours = Cell(**GUIDED["z_i alone"])
    name, other = min(
        ((name, Cell(**how)) for name, how in ALONE.items()), key=lambda named: numbers.distance(named[1]).value
    )
    fd, right = numbers.nearer(ours, other), numbers.more(ours, other)
    yield Row(
        "the prior's z_i is better than z_t, where no caption helps",
        "5.1",
        f"no caption, guidance 2: z_i of the prior − {name} (the best of {len(ALONE)} ways)",
        f"FD {numbers.distance(ours).value:.0f} against {numbers.distance(other).value:.0f}: {told(fd, 0, True)}; "
        f"right {told(right, sign=True)}",
        f"FD {below(fd)}, right {above(right)}",
    )
    dropped, trained = (_best(numbers, name)[1] for name in ("caption alone", "caption alone, decoder trained so"))
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
    for diffusion, autoregressive, budget in (
        (DEMO, "ar-prior", "the demo's"),
        ("prior-long", "ar-prior-long", "twice"),
    ):
        new, old = Cell(embedding=diffusion), Cell(embedding=autoregressive)
        pairs = [Cell("pair", embedding=prior, count=PAIRS) for prior in (diffusion, autoregressive)]
        if not numbers.done(new, old, *pairs):
            continue
        z, fd = numbers.nearer(new, old, key="z"), numbers.nearer(new, old)
        pair = numbers.more(*pairs, attribute="colours")
        yield Row(
            "at comparable size and less compute the diffusion prior is better than the autoregressive one",
            "2.2, 5.2, tables 1 and 2",
            f"diffusion − autoregressive at equal training FLOPs ({budget}), the same decoder",
            f"FD of z_i {told(z, 0, True)}; FD of pictures {told(fd, 0, True)}; right "
            f"{told(numbers.more(new, old), sign=True)}; pairs' colours {told(pair, sign=True)}",
            f"z_i {below(z)}, pictures {below(fd)}",
        )


def _guided(numbers: Numbers) -> Iterator[Row]:
    yield _less_lost(
        numbers,
        ("guidance costs unCLIP little diversity, and a model of captions much", "5.3, figures 9 and 10"),
        ("z_i and caption", "caption alone, trained so"),
    )
    for other in ("caption alone", "caption, z_i given"):
        yield _less_lost(
            numbers, ("the same within one decoder: z_i guided or the caption guided", "5.3"), ("z_i alone", other)
        )
    for how in ("z_i and caption", "caption, z_i given", "caption alone, trained so"):
        new, old = (Cell(**GUIDED[how], guidance=scale) for scale in (2.0, 1.0))
        right, exact = numbers.more(new, old), numbers.nearer(new, old, precision)
        yield Row(
            f"guidance raises fidelity: {how}",
            "5.3, figure 11",
            "guidance 2 − 1",
            f"right {told(right, sign=True)}; precision {told(exact, 2, True)}; FD "
            f"{told(numbers.nearer(new, old), 0, True)}",
            f"right {above(right)}, precision {above(exact)}",
        )


def _less_lost(numbers: Numbers, said: tuple[str, str], ways: tuple[str, str]) -> Row:
    """Whether guidance of the first way costs less recall than guidance of the second."""
    figures, verdicts = [], []
    for scale in STRONG:
        first, second = (
            [(1, Cell(**GUIDED[way], guidance=scale)), (-1, Cell(**GUIDED[way], guidance=1.0))] for way in ways
        )
        between = numbers.combined([*first, *((-sign, cell) for sign, cell in second)], recall)
        changes = " against ".join(told(numbers.combined(terms, recall), 2, True) for terms in (first, second))
        figures.append(f"to {scale:.0f}: {changes}, difference {told(between, 2, True)}")
        verdicts.append(above(between))
    compared = f"change of recall from guidance 1: {ways[0]} − {ways[1]}"
    return Row(*said, compared, "; ".join(figures), " and ".join(verdicts))


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
    new, old = (ancestral(network, FIXED[0], PAPER_STEPS) for network in ("decoder-learned", DEMO))
    fd, right = numbers.nearer(new, old), numbers.more(new, old)
    yield Row(
        "learning them costs the pictures nothing (the hybrid loss)",
        "Nichol & Dhariwal 2021, section 3",
        f"decoder with learned variances − the demo's, equal budgets; both with fixed-small ones, {PAPER_STEPS} steps",
        f"FD {told(fd, 0, True)}; right {told(right, sign=True)}",
        "no" if fd.low > 0 or right.high < 0 else "yes",
    )
    bits = [numbers.line(Bits("decoder-learned", which, PAPER_STEPS))["bits"] for which in LEARNED]
    better = [paired_difference(bits[0], fixed) for fixed in bits[1:]]
    yield Row(
        "learned variances lower the bound",
        "Nichol & Dhariwal 2021, section 3",
        f"bits per dimension over {PAPER_STEPS} steps, one network, learned − fixed-small, and − fixed-large",
        " and ".join(told(one, 1, True) for one in better),
        " and ".join(below(one) for one in better),
    )


def _upsampled(numbers: Numbers) -> Iterator[Row]:
    trained = ((DEMO, "upsampler-plain"), ("upsampler-again", "upsampler-plain-again"))
    both = [names for names in trained if numbers.done(*(Enlarged(*cell) for cell in product(names, CONDITIONS)))]
    drawn = [tuple(Enlarged(name) for name in names) for names in both]
    fds = [numbers.nearer(*cells) for cells in drawn]
    yield Row(
        "conditions corrupted in training make an upsampler robust",
        "2.1",
        "32 → 64 of the decoder's pictures: trained with blur − without (a figure a training seed)",
        f"FD {' and '.join(told(fd, 1, True) for fd in fds)}; right "
        f"{' and '.join(told(numbers.more(*cells), sign=True) for cells in drawn)}",
        " and ".join(below(fd) for fd in fds),
    )
    for condition, sign in (("blurred", above), ("clean", below)):
        psnr = [
            paired_difference(*(numbers.line(Enlarged(name, condition))["psnr"] for name in names)) for names in both
        ]
        yield Row(
            {"blurred": "the same, blurred conditions", "clean": "its price: clean conditions"}[condition],
            {"blurred": "2.1", "clean": "–"}[condition],
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
    yield Row(
        "attributes are bound badly: two objects",
        "7, figures 14 and 15",
        "held-out pairs; of objects with a wanted colour and one of the two wanted shapes, the share with their own "
        "shape and not the other's (unbound: .5)",
        f"both objects right {told(right)}; own shape {bound({})}; from a true z_i {bound(FED['true z_i'])}; "
        f"decoder of captions {bound(FED['caption alone, decoder trained so'])}",
        unbound(share),
    )
    glide = Cell(**FED["caption alone, decoder trained so"], scenes="pair", count=PAIRS)
    coloured = [np.array(numbers.right(cell, "colours"), bool) for cell in (ours, glide)]
    placed = [
        np.array(numbers.right(cell, "relation"))[both] for cell, both in zip((ours, glide), coloured, strict=True)
    ]
    shared = coloured[0] & coloured[1]
    place = paired_difference(*(np.array(numbers.right(cell, "relation"))[shared] for cell in (ours, glide)))
    yield Row(
        "a decoder of captions alone binds better than unCLIP",
        "7, figure 14",
        "held-out pairs with both colours there: they lie as the caption says; z_i of the prior − a decoder of "
        f"captions alone, over the {shared.sum()} prompts that both have",
        f"{' against '.join(f'{told(wilson(int(some.sum()), len(some)), 2)} of {len(some)}' for some in placed)}: "
        f"{told(place, 2, True)}",
        below(place),
    )
    words = numbers.line(Words())
    shares = {what: wilson(sum(words[what]), len(words[what])) for what in ("colours", "relation")}
    yield Row(
        "… since CLIP's embedding does not bind them",
        "7",
        "true pictures of pairs: CLIP prefers the caption to the one with exchanged colours, or with the converse "
        "relation (chance: .5)",
        f"colours {told(shares['colours'])}; relation {told(shares['relation'])}",
        ", ".join(f"{what} {unbound(share)}" for what, share in shares.items()),
    )
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


def unbound(share: Estimate) -> str:
    """Whether a share of right bindings, by chance .5, is that of a model that does not bind."""
    return "yes" if share.low <= 0.5 else "in part" if share.low <= BOUND else "no"
