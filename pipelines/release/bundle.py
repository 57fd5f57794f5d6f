"""A release: one bundle of all models, judged by the gate, entered into the ledger.

Stages `bundle`, `gate` and `promote`; how a release is found and opened again is in opening.py. The ledger is the truth
about which release is champion; what a person does with it by hand is in releases.py, its mirror in MLflow in
registry.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.documents import canonical
from infra.errors import Refused
from infra.ledger import Entry, Ledger
from infra.records.commit import unfold
from infra.records.manifest import Action, Manifest, Record
from infra.records.objects import object_name, read_object
from infra.store.base import Store
from pipelines.evaluate import scores
from pipelines.stage import plain
from unclip.config import FRACTION, outside

DATA = ("source", "download", "filter", "embed", "curate", "statistics")
"""Stages whose versions are noted in a release, beside its models'."""
VERDICT = "verdict.json"
PROMOTION = "promotion.json"


@dataclass(frozen=True)
class BundleSpec:
    """What a release says beside its weights."""

    name: str
    """The model line."""
    sampling: dict[str, Any]
    """prior, decoder → unclip.Sampling as plain JSON; upsamplers → side → the same."""


@dataclass(frozen=True)
class Bundle:
    """Stage: all models → one release folder (unclip/release/release.py), checked to fit together."""

    spec: BundleSpec
    models: tuple[str, ...]
    """prior, decoder, upsampler-64, inpainter, …: the stages that train them."""
    measured: bool = False
    """Whether stage `gamma` measures what Analytic-DPM needs to know of the prior."""
    name: str = "bundle"
    group: str = "bundle"
    version: int = 1
    kind: str = "driver"
    how: None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """CLIP, the models, and the data that they come from; then what was measured of them."""
        return ("clip", *self.models, *DATA, *(("gamma",) if self.measured else ()))

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        """One in all, on the versions of its inputs."""
        yield Action(f"{self.name}/{self.version}", plain(self.spec), tuple(manifest.version for manifest in inputs))

    def setup(self) -> None:
        """Nothing to set up."""

    def run(self, action: Action, store: Store, out: Path) -> Record:
        """Joins the models; raises Refused where they do not fit together."""
        from unclip.diffusion.settings import Sampling
        from unclip.release.folder import save_release

        versions = dict(zip(self.needs, action.inputs, strict=True))
        components = ("clip", *self.models)
        sampling = {name: self.spec.sampling[name] for name in self.models if name in self.spec.sampling}
        for side, settings in self.spec.sampling.get("upsamplers", {}).items():
            sampling[f"upsampler-{side}"] = settings
        with store.scratch() as parts:
            for name in components:
                unfold(store, Manifest.load(store, versions[name], name).only, parts / name)
            if self.measured:
                unfold(store, Manifest.load(store, versions["gamma"], "gamma").only, parts / "prior")
            save_release(
                out,
                self.spec.name,
                {name: parts / name for name in components},
                {name: Sampling(**settings) for name, settings in sampling.items()},
                versions,
            )
        return Record.of(action, out)


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
class Gate:
    """Stage: scores → a verdict; Refused with code 3, saying why, where they do not reach.

    head: the ledger's, as the run began. The champion that a release is judged against is in the action's key.
    """

    spec: GateSpec
    head: Entry | None
    name: str = "gate"
    group: str = "gate"
    version: int = 1
    needs: tuple[str, ...] = ("evaluate", "bundle")
    kind: str = "driver"
    how: None = None

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        """One in all. For the champion itself it is the action that made it champion, which is done."""
        evaluate, bundle = inputs
        spec = {**plain(self.spec), "champion": judged_against(self.head, bundle.version)}
        yield Action(f"{self.name}/{self.version}", spec, (evaluate.version, bundle.version))

    def setup(self) -> None:
        """Nothing to set up."""

    def run(self, action: Action, store: Store, out: Path) -> Record:
        evaluate, bundle = action.inputs
        verdict = judge(store, self.spec, evaluate, action.spec["champion"])
        if verdict["reasons"] and not (self.head and self.head.release == bundle):
            raise Refused(
                f"the gate refused release {bundle[:12]}: {'; '.join(verdict['reasons'])}. "
                f"{_standing(self.head)} Its scores are kept (unclip releases show {bundle[:12]}); to promote it all "
                f"the same: unclip releases promote {bundle[:12]} --reason …",
                code=3,
            )
        (out / VERDICT).write_bytes(canonical(verdict) + b"\n")
        return Record.of(action, out, facts={"passed": not verdict["reasons"]})


@dataclass(frozen=True)
class Promote:
    """Stage: a release that passed the gate → the ledger's next entry.

    Refused with code 4 where the ledger has moved on since the gate judged, and with code 3 for a release that was
    rolled back: only a person brings that one back.
    """

    line: str
    """Name of the ledger."""
    head: Entry | None
    name: str = "promote"
    group: str = "promote"
    version: int = 1
    needs: tuple[str, ...] = ("gate", "evaluate", "bundle")
    kind: str = "driver"
    how: None = None

    @property
    def spec(self) -> dict[str, str]:
        """The model line."""
        return {"name": self.line}

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        """One in all; the head that it must follow is in its key."""
        gate, _, bundle = inputs
        spec = {**self.spec, "after": after(self.head, bundle.version), "gate": gate.only.key}
        yield Action(f"{self.name}/{self.version}", spec, tuple(manifest.version for manifest in inputs))

    def setup(self) -> None:
        """Nothing to set up."""

    def run(self, action: Action, store: Store, out: Path) -> Record:
        _, evaluate, bundle = action.inputs
        ledger = Ledger(store, self.line)
        entry = ledger.head()
        if entry is None or entry.release != bundle:  # else: it is champion already, perhaps by a run that was killed
            _refuse_rolled_back(ledger, bundle)
            facts = {
                "evaluate": evaluate,
                "scores": Manifest.load(store, evaluate).only.facts.get("scores", {}),
                "against": judged_against(self.head, bundle),
                "after": after(self.head, bundle),
            }
            promoted = Entry("promote", bundle, action.spec["gate"], "passed the gate", facts)
            entry = ledger.append(promoted, after=self.head)
        document = {"ledger": self.line, "number": entry.number, "digest": entry.digest, "release": bundle}
        (out / PROMOTION).write_bytes(canonical(document) + b"\n")
        return Record.of(action, out, facts=document)


def judge(store: Store, spec: GateSpec, evaluate: str, champion: dict[str, Any] | None) -> dict[str, Any]:
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


def judged_against(head: Entry | None, bundle: str) -> dict[str, Any] | None:
    """Whom the gate compares a release with: the champion; for the champion itself, whom it was compared with."""
    if head is None:
        return None
    if head.release == bundle:
        return head.facts.get("against")
    return {"release": head.release, "evaluate": head.facts.get("evaluate")}


def after(head: Entry | None, bundle: str) -> str:
    """Digest of the head that a promotion follows ("": none); for the champion itself, the one that it followed."""
    if head is None:
        return ""
    return head.facts.get("after", "") if head.release == bundle else head.digest


def _refuse_rolled_back(ledger: Ledger, bundle: str) -> None:
    entries = list(ledger.entries())
    left = [later for entry, later in itertools.pairwise(entries) if entry.release == bundle]
    if left and left[-1].kind == "rollback":
        raise Refused(
            f"release {bundle[:12]} was rolled back (ledger {ledger.name}, entry {left[-1].number}: "
            f"{left[-1].reason or 'no reason given'}), so no run promotes it again. To bring it back: unclip releases "
            f"promote {bundle[:12]} --name {ledger.name} --reason …",
            code=3,
        )


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
