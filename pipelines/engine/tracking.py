"""What MLflow is told of a run and of its stages beside their figures: recipe, code, machine, data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from infra.records import Action, Manifest, object_name
from infra.store import Store
from infra.tracking import DataSet, git_tags, user_name


def track_fit(monitor: Any, stage: Any, action: Action, store: Store, roles: Mapping[str, str]) -> None:
    """Begins a fit's run: how it is made as parameters, which never change, how it is run as a tag, which may."""
    start = {"start": stage.spec.start} if stage.spec.start else {}
    params = {"model": stage.spec.model, "train": stage.spec.train, **start}
    tags = {
        "unclip.key": action.key,
        "unclip.inputs": " ".join(action.inputs),
        "unclip.how": json.dumps(vars(stage.how), sort_keys=True),
        **source_tag(f"--only {stage.name}"),
    }
    read = [(need, Manifest.load(store, version)) for need, version in zip(stage.needs, action.inputs, strict=True)]
    monitor.start(stage.name, params, tags, data_sets(store, read, roles))


def source_tag(words: str) -> dict[str, str]:
    """Who started a run, and from what: its page shows the commit beside the command."""
    command = {"mlflow.source.name": f"unclip run {words}", "mlflow.source.type": "LOCAL"}
    return {"mlflow.user": user_name(), **command, **git_tags()}


def track_files(monitor: Any, stage: str, digests: dict[str, str]) -> None:
    """What a fit's record holds: the SHA-256 of each file."""
    monitor.tag(stage, {f"unclip.made.{name}": sha256 for name, sha256 in digests.items()})


def data_sets(store: Store, read: Iterable[tuple[str, Manifest]], roles: Mapping[str, str]) -> list[DataSet]:
    """Each manifest, by the stage that made it, as a data set. Where its list of files lies is what makes it up.

    roles: stage → what its manifest is to a trainer; without one, its name.
    """
    return [
        DataSet(
            name,
            manifest.version,
            f"{store.uri}/{object_name(manifest.version)}",
            roles.get(name) or name,
            {
                "rows": manifest.rows,
                "states": manifest.states,
                "shards": len(manifest.records),
                "bytes": sum(file.bytes for record in manifest.records for file in record.files.values()),
            },
        )
        for name, manifest in read
    ]
