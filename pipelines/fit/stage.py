"""The stages that train: CLIP, prior, decoder, upsamplers, inpainter and guides, each a fit on Ray Train."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import Refused
from infra.records import Action, Record
from infra.store import Store
from pipelines.fit.clip import LoadClip
from pipelines.fit.data_stages import ROLES
from pipelines.stage import StageBase
from training.job import START
from training.launch import FitHow, Job, discard, fit
from training.options import KINDS
from unclip.config import LATER


@dataclass(frozen=True)
class FitSpec:
    """All that decides a model's bytes beside its data: what it is and how it is trained (plain JSON)."""

    model: dict[str, Any]
    train: dict[str, Any]
    start: str = field(default="", metadata=LATER)
    """Version of the release whose model of this name it goes on from; empty: it begins anew."""


@dataclass(frozen=True)
class Fit(StageBase):
    """Trains one model on Ray Train; its record holds config.json and model.safetensors (EMA weights)."""

    name: str
    model: str
    """A kind of `training.options.KINDS`."""
    spec: FitSpec
    how: FitHow
    needs: tuple[str, ...]
    """Data stages and CLIP, and any fit that it goes on from."""
    section: str = ""
    kind = "fit"

    @property
    def group(self) -> str:
        """What the command line calls it."""
        return self.name

    @property
    def role(self) -> str:
        """CLIP, or where another fit goes on from."""
        goes_on = any(self.name in kind.from_kinds for kind in KINDS.values())
        return self.name if self.name == LoadClip.name else START if goes_on else ""

    def run(self, action: Action, store: Store, out: Path) -> Record:
        """A fit runs under a lease, which the executor holds: see `fit`."""
        raise Refused(f"{self.name} is trained by the executor, under a lease", code=5)

    def fit(self, action: Action, store: Store, out: Path, monitor: Any, lease: int) -> Record:
        """Trains to the end (or on from the newest valid checkpoint) and returns the record of what lies in `out`."""
        roles = {**{need: need for need in self.needs}, **dict.fromkeys(KINDS[self.model].from_kinds, START), **ROLES}
        data = {roles[need]: version for need, version in zip(self.needs, action.inputs, strict=True)}
        if self.spec.start:
            data[START] = self.spec.start
        job = Job(self.name, action.key, self.model, self.spec.model, self.spec.train, data)
        facts = fit(job, self.how, store.uri, out, monitor, lease)
        return Record.of(action, out, facts=facts)

    def settle(self, action: Action, store: Store) -> None:
        """Once the record is committed: its checkpoints are no longer needed."""
        discard(store, action.key)
