"""From judged samples to the numbers of one release, and from two releases' numbers to their paired difference."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from infra.documents import SCHEMA_VERSION, check_schema
from infra.errors import Refused
from unclip.metrics import Coverage, cmmd, coverage, frechet, mcnemar, paired_difference, wilson

ALL = "all"
"""The verdict that everything at once is right."""
NEIGHBOURS = 3
"""Of precision and recall, as Kynkäänniemi et al. 2019 chose."""


@dataclass(frozen=True)
class Pictures:
    """A set of drawn pictures, as CLIP sees them."""

    clip_scores: Sequence[float]
    """Of each, with its prompt."""
    drawn: Sequence[Any]
    """Raw embeddings."""
    true: Sequence[Any]
    """Raw embeddings of true pictures of the same prompts; none where there are no such."""

    @cached_property
    def overlap(self) -> Coverage | None:
        """Precision and recall; None of a handful."""
        few = min(len(self.drawn), len(self.true)) <= NEIGHBOURS
        return None if few else coverage(self.drawn, self.true, NEIGHBOURS)


@dataclass(frozen=True)
class Metric:
    """A number that says something of a set of pictures."""

    measure: Callable[[Pictures], float | None]
    """None: it cannot be said of these."""
    compared: bool = True
    """Whether it takes true pictures beside the drawn ones."""


METRICS: dict[str, Metric] = {
    "clip_score": Metric(lambda seen: sum(seen.clip_scores) / len(seen.clip_scores), compared=False),
    "cmmd": Metric(lambda seen: cmmd(seen.drawn, seen.true) if seen.true else None),
    "fd": Metric(lambda seen: frechet(seen.drawn, seen.true) if min(len(seen.drawn), len(seen.true)) > 1 else None),
    "precision": Metric(lambda seen: seen.overlap and seen.overlap.precision),
    "recall": Metric(lambda seen: seen.overlap and seen.overlap.recall),
}
"""What CLIP's embeddings say of a set of pictures (unclip/metrics.py), in the order of scores.json."""
BUILT_IN = tuple(METRICS)
"""Those that every evaluation has; what plug-ins add is in an evaluation's key."""


def score(rows: Sequence[dict[str, Any]], release: str) -> dict[str, Any]:
    """The document scores.json of samples (rows of samples.parquet, in the order of the prompts).

    kinds → count, attributes (and ceiling, floor, zero_shot: attribute → value, low, high, count), clip_score, and what
    compares the CLIP embeddings of all pictures with those of true ones: cmmd, fd, precision and recall. items holds
    verdict and CLIP score of every prompt in order, for paired comparisons. What could not be measured is null:
    verdicts without a judge, ceiling and what is compared without true pictures, precision and recall of a handful.
    """
    kinds: dict[str, Any] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        part = [row for row in rows if row["kind"] == kind]
        kinds[kind] = {
            "count": len(part),
            "attributes": _rates(part, "verdict"),
            "ceiling": _rates(part, "true_verdict"),
            "floor": _rates(part, "floor_verdict"),
            "zero_shot": _rates(part, "zero_shot"),
            **_similarity(part),
        }
    verdicts = [_verdict(row, "verdict") for row in rows]
    return {
        "schema_version": SCHEMA_VERSION,
        "release": release,
        "count": len(rows),
        **_similarity(rows),
        "kinds": kinds,
        "items": {
            "prompt": [row["prompt"] for row in rows],
            "kind": [row["kind"] for row in rows],
            "seed": [row["seed"] for row in rows],
            ALL: [None if verdict is None else verdict[ALL] for verdict in verdicts],
            "clip_score": [round(row["clip_score"], 6) for row in rows],
        },
    }


def read(data: bytes, where: str = "scores.json") -> dict[str, Any]:
    """The document of a scores.json; raises Refused for an unknown schema version."""
    return check_schema(json.loads(data), where)


def flat(scores: dict[str, Any]) -> dict[str, float]:
    """The main numbers under dotted names ("single.all", "single.all.low", "pair.ceiling.all", "cmmd"), as metrics."""
    found = {name: scores.get(name) for name in METRICS}  # the first documents had two of them
    for kind, part in scores["kinds"].items():
        found |= {f"{kind}.{name}": part.get(name) for name in METRICS}
        for name, rate in (part["attributes"] or {}).items():
            found |= {f"{kind}.{name}": rate["value"], f"{kind}.{name}.low": rate["low"]}
        for group in ("ceiling", "floor", "zero_shot"):
            found |= {f"{kind}.{group}.{name}": rate["value"] for name, rate in (part[group] or {}).items()}
    return {name: value for name, value in found.items() if value is not None}


def check_name(name: str, kinds: Sequence[str], *, judge: bool, reference: bool) -> None:
    """Raises Refused for a name that `flat` cannot give for prompts of these kinds, with or without judge and truth.

    What a judge calls its attributes is its own affair, so any name behind a kind may be one.
    """
    kind = max((kind for kind in kinds if name.startswith(f"{kind}.")), key=len, default="")
    measure = name.removeprefix(f"{kind}.") if kind else name
    if measure in METRICS and METRICS[measure].compared and not reference:
        raise Refused(f"{name} compares with true pictures, and evaluate.reference names none")
    if measure in METRICS:
        return
    if not kind:
        raise Refused(
            f"no evaluation gives a score {name!r}; there are {', '.join(METRICS)}, and for each kind of prompt "
            f"({', '.join(kinds)}) its own and what the judge says, such as {kinds[0]}.all"
        )
    if not judge:
        raise Refused(f"{name} is a judge's verdict, and evaluate.judge names none")


def compare(new: dict[str, Any], old: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Kind → difference new − old of the verdict "all" and of the CLIP score over the same prompts and seeds.

    Each as <name>, <name>.low, <name>.high (95 %, paired bootstrap), and all.p (McNemar, exact). Raises Refused where
    the two were not asked the same.
    """
    for name in ("prompt", "kind", "seed"):
        if new["items"][name] != old["items"][name]:
            raise Refused(
                f"the releases {new['release'][:12]} and {old['release'][:12]} were evaluated on different prompts or "
                "seeds, so their scores cannot be compared one by one. Evaluate both on the same prompts."
            )
    found: dict[str, dict[str, float]] = {}
    kinds = new["items"]["kind"]
    for kind in dict.fromkeys(kinds):
        found[kind] = {}
        for name in (ALL, "clip_score"):
            pairs = [
                (a, b)
                for of, a, b in zip(kinds, new["items"][name], old["items"][name], strict=True)
                if of == kind and a is not None and b is not None
            ]
            if not pairs:
                continue
            mine, theirs = [a for a, _ in pairs], [b for _, b in pairs]
            value, low, high = paired_difference(mine, theirs)
            found[kind] |= {name: value, f"{name}.low": low, f"{name}.high": high}
            if name == ALL:
                found[kind]["all.p"] = mcnemar(mine, theirs)
    return found


def _verdict(row: dict[str, Any], column: str) -> dict[str, bool] | None:
    return None if row[column] is None else json.loads(row[column])


def _rates(rows: Sequence[dict[str, Any]], column: str) -> dict[str, Any] | None:
    """Attribute → how often it is right among the rows that say so; None where no row does."""
    verdicts = [verdict for row in rows if (verdict := _verdict(row, column)) is not None]
    names = dict.fromkeys(name for verdict in verdicts for name in verdict)
    rates = {}
    for name in names:
        said = [verdict[name] for verdict in verdicts if name in verdict]
        rates[name] = {**wilson(sum(said), len(said))._asdict(), "count": len(said)}
    return rates or None


def _similarity(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    seen = Pictures(
        [row["clip_score"] for row in rows],
        [row["embedding"] for row in rows],
        [row["true_embedding"] for row in rows if row["true_embedding"] is not None],
    )
    return {name: metric.measure(seen) for name, metric in METRICS.items()}
