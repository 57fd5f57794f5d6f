"""What data a store holds: versions of every stage, and what became of every row of a list.

Each row of the list is in exactly one final state; `reconcile` adds them up over the stages and refuses to guess.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from infra.records import Manifest, document
from infra.store import Store
from pipelines.engine import find_version, list_versions

if TYPE_CHECKING:
    from rich.table import Table


def table(store: Store) -> Table:
    """`list_versions` for a terminal."""
    from rich.table import Table

    out = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("stage", "version", "shards", "rows", "made"):
        out.add_column(title, no_wrap=True)
    out.add_column("states", overflow="fold")
    for one in list_versions(store):
        states = ", ".join(f"{state} {count}" for state, count in one.states.items())
        out.add_row(
            one.stage,
            one.version[:12],
            str(one.shards),
            str(one.rows),
            f"{one.made:%Y-%m-%d %H:%M}",
            states,
        )
    return out


def show(store: Store, version: str) -> dict[str, Any]:
    """One version, named by its first digits: how it was made, its rows, states, and the files of each shard."""
    one = find_version(store, version)
    head = document(store, one.head)
    shards = [
        {
            "rows": record.rows,
            "states": record.states,
            "files": {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in record.files.items()},
            "facts": record.facts,
        }
        for record in Manifest.load(store, one.version).records
    ]
    return {
        "stage": one.stage,
        "version": one.version,
        "made": one.made.isoformat(timespec="seconds"),
        "action": head["action"],
        "rows": one.rows,
        "states": one.states,
        "shards": shards,
    }
