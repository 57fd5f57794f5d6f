"""The promotion of a release that passed the gate."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from infra.documents import canonical
from infra.errors import Refused
from infra.ledger import Entry, Ledger
from infra.records import Action, Manifest, Record
from infra.store import Store
from pipelines.promote.gate import compared_with
from pipelines.stage import StageBase

PROMOTION = "promotion.json"


@dataclass(frozen=True)
class Promote(StageBase):
    """Stage: a release that passed the gate → the ledger's next entry.

    Refused with code 4 where the ledger has moved on since the gate judged, and with code 3 for a release that was
    rolled back: only a person brings that one back.
    """

    line: str
    """Name of the ledger."""
    head: Entry | None
    how = None
    name = group = "promote"
    needs = ("gate", "evaluate", "bundle")

    @property
    def spec(self) -> dict[str, str]:
        """The model line."""
        return {"name": self.line}

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        """One in all; the head that it must follow is in its key."""
        gate, _, bundle = inputs
        spec = {**self.spec, "after": required_head(self.head, bundle.version), "gate": gate.only.key}
        yield self.action(spec, (manifest.version for manifest in inputs))

    def run(self, action: Action, store: Store, out: Path) -> Record:
        _, evaluate, bundle = action.inputs
        ledger = Ledger(store, self.line)
        entry = ledger.head()
        if entry is None or entry.release != bundle:  # else: it is champion already, perhaps by a run that was killed
            _refuse_rolled_back(ledger, bundle)
            facts = {
                "evaluate": evaluate,
                "scores": Manifest.load(store, evaluate).only.facts.get("scores", {}),
                "against": compared_with(self.head, bundle),
                "after": required_head(self.head, bundle),
            }
            promoted = Entry("promote", bundle, action.spec["gate"], "passed the gate", facts)
            entry = ledger.append(promoted, after=self.head)
        document = {"ledger": self.line, "number": entry.number, "digest": entry.digest, "release": bundle}
        (out / PROMOTION).write_bytes(canonical(document) + b"\n")
        return Record.of(action, out, facts=document)


def required_head(head: Entry | None, bundle: str) -> str:
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
