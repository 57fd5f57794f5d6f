"""Versions of the data: which there are, and that their rows add up."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from infra.errors import Refused
from infra.records import KEPT, LISTED, Manifest, document, explain_damage
from infra.store import Store


@dataclass(frozen=True)
class Version:
    """One version of one stage's output: the newest head of that version."""

    stage: str
    """Name and version of the stage, "embed/1"."""
    version: str
    """SHA-256 of the manifest's body, in hex."""
    shards: int
    rows: int
    states: dict[str, int]
    made: datetime
    """When it was first made by that action (UTC)."""
    head: str
    """Name of the head in the store."""


def list_versions(store: Store) -> list[Version]:
    """Every version in the store, by stage, the newest of each first."""
    found: dict[tuple[str, str], Version] = {}
    for entry in store.list("manifests/"):
        with explain_damage(entry.name):
            head = document(store, entry.name)
            stage, version = head["action"]["stage"], head["version"]
            known = found.get((stage, version))
            if known is None or known.made < entry.modified:
                found[stage, version] = Version(
                    stage, version, len(head["records"]), head["rows"], head["states"], entry.modified, entry.name
                )
    return sorted(found.values(), key=lambda one: (one.stage, -one.made.timestamp()))


def find_version(store: Store, version: str) -> Version:
    """The version of those first digits; Refused where there is none, or several."""
    matching = [one for one in list_versions(store) if version and one.version.startswith(version.lower())]
    if not matching:
        raise Refused(f"there is no version {version!r} in {store.uri}; `unclip data ls` lists those that there are")
    if len({one.version for one in matching}) > 1:
        raise Refused(f"{version!r} begins {len(matching)} versions in {store.uri}; give more digits")
    return matching[0]


def reconcile(source: Manifest, *chain: Manifest) -> dict[str, int]:
    """The final state of every row of the list → rows: "download.http_404", "filter.size", …, and "kept".

    chain: what the stages made that rows pass through behind the source, in their order. The counts add up to the
    list's rows; raises Refused where what one stage passed on is not what the next one got.
    """
    final: dict[str, int] = {}
    passed = source.rows
    for manifest in (source, *chain):
        name = manifest.action.stage.partition("/")[0]
        if manifest.rows != passed:
            raise Refused(
                f"{name} accounts for {manifest.rows} rows, and {passed} were passed on to it. These versions do not "
                "belong together, or a stage is defective.",
                code=5,
            )
        on = LISTED if manifest is source else KEPT
        passed = manifest.states.get(on, 0)
        final |= {f"{name}.{state}": count for state, count in manifest.states.items() if state != on}
    final[KEPT] = passed
    if sum(final.values()) != source.rows:
        raise Refused(
            f"the list has {source.rows} rows, and their final states add up to {sum(final.values())}", code=5
        )
    return final
