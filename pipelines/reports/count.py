"""Stage `data-count`, a map: what the data report says of one shard, counted once and for all.

The files of a shard are named by digest, so that a run after which one shard is another counts that shard alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.records import Action, Manifest, Record, stored_file
from infra.store import Store
from pipelines.reports.census import count_shard, shards, write
from pipelines.stage import StageBase


@dataclass(frozen=True)
class Count(StageBase):
    """Stage: download, filter, embed and curate → for each shard what `census.Part` holds."""

    spec: dict[str, Any] = field(default_factory=dict)
    how = None
    name = "data-count"
    group = "curate"
    needs = ("download", "filter", "embed", "curate")
    kind = "task"
    maps = "download"

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        """One for each shard: its index, its embedded rows and both selections."""
        for shard in shards(dict(zip(self.needs, inputs, strict=True))):
            yield self.action(self.spec, (file.sha256 for file in shard.tables if file))

    def run(self, action: Action, store: Store, out: Path) -> Record:
        index, filtered, rows, curated = (stored_file(store, sha256) for sha256 in action.inputs)
        part = count_shard(store, (index, filtered, rows, curated))
        write(part, out)
        return Record.of(action, out, states={"counted": sum(rows for _, _, rows in part.hosts)})
