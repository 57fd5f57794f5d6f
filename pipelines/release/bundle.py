"""A release: one bundle of all models of a run, as files of one record.

Stages `bundle`, `gate` and `promote`; how a release is found and opened again is in opening.py. The ledger is the truth
about which release is champion; what a person does with it by hand is in releases.py, its mirror in MLflow in
registry.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.records import Action, Manifest, Record, materialise
from infra.store import Store
from pipelines.embed import Statistics
from pipelines.fit import CHAIN
from pipelines.stage import StageBase

DATA = (*CHAIN, Statistics.name)
"""Stages whose versions are noted in a release, beside its models'."""


@dataclass(frozen=True)
class BundleSpec:
    """What a release says beside its weights."""

    name: str
    """The model line."""
    sampling: dict[str, Any]
    """prior, decoder → unclip.Sampling as plain JSON; upsamplers → side → the same."""


@dataclass(frozen=True)
class Bundle(StageBase):
    """Stage: all models → one release folder (unclip/release/folder.py), checked to fit together."""

    spec: BundleSpec
    models: tuple[str, ...]
    """prior, decoder, upsampler-64, inpainter, …: the stages that train them."""
    measured: bool = False
    """Whether stage `gamma` measures what Analytic-DPM needs to know of the prior."""
    how = None
    name = group = "bundle"

    @property
    def needs(self) -> tuple[str, ...]:
        """CLIP, the models, and the data that they come from; then what was measured of them."""
        return ("clip", *self.models, *DATA, *(("gamma",) if self.measured else ()))

    def run(self, action: Action, store: Store, out: Path) -> Record:
        """Joins the models; raises Refused where they do not fit together."""
        from unclip.diffusion import Sampling
        from unclip.release import save_release

        versions = dict(zip(self.needs, action.inputs, strict=True))
        components = ("clip", *self.models)
        sampling = {name: self.spec.sampling[name] for name in self.models if name in self.spec.sampling}
        for side, settings in self.spec.sampling.get("upsamplers", {}).items():
            sampling[f"upsampler-{side}"] = settings
        with store.scratch() as parts:
            for name in components:
                materialise(store, Manifest.load(store, versions[name], name).only, parts / name)
            if self.measured:
                materialise(store, Manifest.load(store, versions["gamma"], "gamma").only, parts / "prior")
            save_release(
                out,
                self.spec.name,
                {name: parts / name for name in components},
                {name: Sampling(**settings) for name, settings in sampling.items()},
                versions,
            )
        return Record.of(action, out)
