"""The stages that train: CLIP, prior, decoder, upsamplers, guides; and the one that loads a CLIP instead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import Refused
from infra.records import Action, Manifest, Record
from infra.store import Store
from pipelines.stage import ROLES, plain
from training.job import START
from training.launch import FitHow, Job, discard, fit
from unclip.config import LATER


@dataclass(frozen=True)
class FitSpec:
    """All that decides a model's bytes beside its data: what it is and how it is trained (plain JSON)."""

    model: dict[str, Any]
    train: dict[str, Any]
    start: str = field(default="", metadata=LATER)
    """Version of the release whose model of this name it goes on from; empty: it begins anew."""


@dataclass(frozen=True)
class Fit:
    """Trains one model on Ray Train; its record holds config.json and model.safetensors (EMA weights)."""

    name: str
    model: str
    """A kind of `training.job.KINDS`."""
    spec: FitSpec
    how: FitHow
    needs: tuple[str, ...]
    version: int = 1
    kind: str = "fit"

    @property
    def group(self) -> str:
        """What the command line calls it."""
        return self.name

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        """One in all, on the versions of its inputs."""
        yield Action(f"{self.name}/{self.version}", plain(self.spec), tuple(manifest.version for manifest in inputs))

    def setup(self) -> None:
        """Workers set themselves up."""

    def run(self, action: Action, store: Store, out: Path) -> Record:
        """A fit runs under a lease, which the executor holds: see `fit`."""
        raise Refused(f"{self.name} is trained by the executor, under a lease", code=5)

    def fit(self, action: Action, store: Store, out: Path, monitor: Any, lease: int) -> Record:
        """Trains to the end (or on from the newest valid checkpoint) and returns the record of what lies in `out`."""
        data = {ROLES[need]: version for need, version in zip(self.needs, action.inputs, strict=True)}
        if self.spec.start:
            data[START] = self.spec.start
        job = Job(self.name, action.key, self.model, self.spec.model, self.spec.train, data)
        facts = fit(job, self.how, store.uri, out, monitor, lease)
        return Record.of(action, out, facts=facts)

    def settle(self, action: Action, store: Store) -> None:
        """Once the record is committed: its checkpoints are no longer needed."""
        discard(store, action.key)
