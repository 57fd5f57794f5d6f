"""Recipes that go on from a release: which version `start` means, and a release's CLIP taken as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import Refused
from infra.records.commit import unfold
from infra.records.manifest import Action, Manifest, Record
from infra.store.base import Store
from pipelines.recipe.schema import Recipe
from pipelines.release.open import CHAMPION, find
from pipelines.stage import plain

CLIP = "clip/"


def starts(recipe: Recipe, store: Store) -> dict[str, str]:
    """What the recipe's sections call their `start` → the version of that release.

    Raises Refused for a champion, which the run itself may replace: run again, it would train all anew.
    """
    sections = [recipe.clip, recipe.prior, recipe.ar_prior, recipe.decoder, recipe.inpainter]
    sections += [recipe.classifier, recipe.noised_clip, *recipe.upsamplers.values()]
    named = {section.start for section in sections if section is not None and section.start is not None}
    found = {}
    for ref in sorted(named):
        version = find(store, ref)
        if ref == CHAMPION or ref.endswith(f"@{CHAMPION}"):
            raise Refused(
                f"start is {ref}, which this run may replace, so that the next one would train anew. Name the release "
                f"that it means now: start: {version[:12]}"
            )
        found[ref] = version
    return found


@dataclass(frozen=True)
class TakeSpec:
    """Whose CLIP, and what it has to be."""

    release: str
    """Version of the release."""
    model: dict[str, Any]
    """open_clip's configuration, as the recipe says it."""


@dataclass(frozen=True)
class TakeClip:
    """Takes a release's CLIP, byte for byte, as this pipeline's: what starts from that release needs this very one."""

    spec: TakeSpec
    how: None = None
    name: str = "clip"
    group: str = "clip"
    needs: tuple[str, ...] = ()
    version: int = 1
    kind: str = "driver"

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        """One in all; it reads no data."""
        yield Action(f"{self.name}/{self.version}", plain(self.spec), ())

    def setup(self) -> None:
        """Nothing to set up."""

    def run(self, action: Action, store: Store, out: Path) -> Record:
        """Copies it; raises Refused where the recipe describes another one."""
        from unclip.clip.model import Clip

        bundle = Manifest.load(store, self.spec.release, "bundle").only
        files = {name.removeprefix(CLIP): file for name, file in bundle.files.items() if name.startswith(CLIP)}
        unfold(store, Record(action.key, 0, files, 0, {}, (), {}), out)
        clip = Clip.load(out)
        if clip.config != json.loads(json.dumps(self.spec.model)):
            raise Refused(
                f"clip.model is not the configuration of the CLIP of release {self.spec.release[:12]}, which is "
                f"{json.dumps(clip.config)}"
            )
        return Record.of(action, out, facts={"fingerprint": clip.fingerprint})
