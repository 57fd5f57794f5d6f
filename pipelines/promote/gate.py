"""The gate: whether a release is good enough, by its own scores and beside the champion."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.documents import canonical
from infra.errors import Refused
from infra.ledger import Entry
from infra.records import Action, Manifest, Record, object_name, read_object
from infra.store import Store
from pipelines.evaluate import scores
from pipelines.stage import StageBase, plain
from unclip.config import FRACTION, outside

VERDICT = "verdict.json"


@dataclass(frozen=True)
class GateSpec:
    """What a release must reach to become champion."""

    minimum: dict[str, float] = field(default_factory=dict)
    """Score → least value; names as in scores.flat: single.all, pair.all, clip_score, …"""
    tolerance: float = 0.02
    """How far the share of prompts that are all right may fall below the champion's, on the same prompts and noise. A
    fall beyond it counts if it is more than chance: if the paired difference's 95 % interval lies below 0."""

    def __post_init__(self) -> None:
        if wrong := outside(self, tolerance=FRACTION):
            raise Refused(f"gate.{wrong}, for it is a difference of two shares")
        for name, least in self.minimum.items():
            if not math.isfinite(least):
                raise Refused(f"gate.minimum.{name} is {least}; it must be a finite number")


@dataclass(frozen=True)
class Gate(StageBase):
    """Stage: scores → a verdict; Refused with code 3, saying why, where they do not reach.

    head: the ledger's, as the run began. The champion that a release is judged against is in the action's key.
    """

    spec: GateSpec
    head: Entry | None
    how = None
    name = group = "gate"
    needs = ("evaluate", "bundle")

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        """One in all. For the champion itself it is the action that made it champion, which is done."""
        evaluate, bundle = inputs
        spec = {**plain(self.spec), "champion": compared_with(self.head, bundle.version)}
        yield self.action(spec, (evaluate.version, bundle.version))

    def run(self, action: Action, store: Store, out: Path) -> Record:
        evaluate, bundle = action.inputs
        verdict = decide(store, self.spec, evaluate, action.spec["champion"])
        if verdict["reasons"] and not (self.head and self.head.release == bundle):
            raise Refused(
                f"the gate refused release {bundle[:12]}: {'; '.join(verdict['reasons'])}. "
                f"{_standing(self.head)} Its scores are kept (unclip releases show {bundle[:12]}); to promote it all "
                f"the same: unclip releases promote {bundle[:12]} --reason …",
                code=3,
            )
        (out / VERDICT).write_bytes(canonical(verdict) + b"\n")
        return Record.of(action, out, facts={"passed": not verdict["reasons"]})


def decide(store: Store, spec: GateSpec, evaluate: str, champion: dict[str, Any] | None) -> dict[str, Any]:
    """The verdict on the scores of that version of `evaluate`; `reasons` is empty if it passed.

    champion: {"release", "evaluate"} of whom it is compared with, prompt by prompt; None if there is none.
    """
    mine = _scores(store, evaluate)
    known, reasons, minimum = scores.flat(mine), [], []
    for name, least in sorted(spec.minimum.items()):
        if name not in known:
            raise Refused(f"gate.minimum names {name!r}, and the scores are {', '.join(sorted(known))}")
        minimum.append({"score": name, "value": known[name], "minimum": least, "passed": known[name] >= least})
        if known[name] < least:
            reasons.append(f"{name} is {known[name]:.3f} and must be at least {least:g} (gate.minimum)")
    comparison, note = _compared(store, mine, champion)
    for kind, difference in comparison.items():
        if difference.get("all", 0.0) < -spec.tolerance and difference["all.high"] < 0:
            reasons.append(
                f"{kind}.all is worse than the champion's by {-difference['all']:.3f} (95 % interval "
                f"{-difference['all.high']:.3f} to {-difference['all.low']:.3f}) and may be by {spec.tolerance:g} "
                "(gate.tolerance)"
            )
    return {
        "schema_version": 1,
        "champion": champion["release"] if champion else None,
        "minimum": minimum,
        "tolerance": spec.tolerance,
        "comparison": comparison,
        "note": note,
        "reasons": reasons,
    }


def compared_with(head: Entry | None, bundle: str) -> dict[str, Any] | None:
    """Whom the gate compares a release with: the champion; for the champion itself, whom it was compared with."""
    if head is None:
        return None
    if head.release == bundle:
        return head.facts.get("against")
    return {"release": head.release, "evaluate": head.facts.get("evaluate")}


def _compared(store: Store, mine: dict[str, Any], champion: dict[str, Any] | None) -> tuple[dict[str, Any], str]:
    """Kind → paired differences to the champion, and why there are none."""
    if champion is None:
        return {}, "there was no champion to compare with"
    if not champion["evaluate"]:
        return {}, "the champion was never evaluated"
    if not store.exists(object_name(champion["evaluate"])):
        return {}, "not compared with the champion: its scores are no longer in the store"
    try:
        return scores.compare(mine, _scores(store, champion["evaluate"])), ""
    except Refused as error:
        if error.code == 5:  # damaged: no reason to judge it less strictly
            raise
        return {}, f"not compared with the champion: {error}"


def _scores(store: Store, evaluate: str) -> dict[str, Any]:
    sha256 = Manifest.load(store, evaluate).only.sha("scores.json")
    return scores.read(read_object(store, sha256))


def _standing(head: Entry | None) -> str:
    return f"The champion stays {head.release[:12]}." if head else "There is no champion yet."
