"""The stages that train: CLIP, prior, decoder, upsamplers, guides; and the one that loads a CLIP instead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from infra.documents import canonical, digest, digest_file
from infra.errors import Refused
from infra.records.manifest import Action, Manifest, Record
from infra.store.base import Store
from pipelines.recipe.errors import blaming
from pipelines.stage import plain
from training.job import START
from training.launch import FitHow, Job, discard, fit
from unclip.clip.open_clip_folder import PREFIX, files_of
from unclip.config import LATER

ROLES = {
    "download": "rows",
    "filter": "selection",
    "embed": "rows",
    "curate": "selection",
    "statistics": "statistics",
    "clip": "clip",
    "decoder": "start",
}
"""What a manifest is to a trainer, by the stage that made it."""


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


@dataclass(frozen=True)
class LoadSpec:
    """A CLIP that exists: an open_clip name with its pretrained tag, or the digest of a weights file."""

    name: str
    """open_clip's model name, for instance ViT-L-14; or local-dir:<folder>, with open_clip_config.json and weights."""
    tag: str = ""
    """open_clip's pretrained tag, for instance laion2b_s32b_b82k."""
    sha256: str = ""
    """SHA-256 of the weights file, where one is given instead of a tag; of a folder, over configuration and weights."""


@dataclass(frozen=True)
class LoadHow:
    """Where a weights file lies; its digest is in the spec."""

    file: str = ""
    """A file of weights that open_clip can load; then the tag counts for nothing. Where `name` is local-dir:<folder>,
    leave it out."""


@dataclass(frozen=True)
class LoadClip:
    """Takes a CLIP from open_clip's hub or from a file and stores it as this pipeline's CLIP.

    It runs in the driver, where the file's digest was taken: the same path on another node may be another file.
    """

    spec: LoadSpec
    how: LoadHow = field(default_factory=LoadHow)
    name: str = "clip"
    group: str = "clip"
    needs: tuple[str, ...] = ()
    version: int = 1
    kind: str = "driver"

    @classmethod
    def of(cls, spec: LoadSpec, how: LoadHow) -> LoadClip:
        """The stage with the digest of the file or folder, if one is given; raises Refused if it is none."""
        if spec.name.startswith(PREFIX):  # the path moves out of the key: a folder is what it holds
            if how.file:
                raise Refused("clip.pretrained.file is given, and the folder of clip.pretrained.name has its weights")
            return cls(LoadSpec(PREFIX, sha256=_digest(spec.name)), LoadHow(spec.name))
        if not how.file:
            return cls(spec, how)
        if not Path(how.file).is_file():
            raise Refused(f"clip.pretrained.file {how.file!r} is no file")
        return cls(replace(spec, tag="", sha256=_digest(how.file)), how)

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        """One in all; it reads no data."""
        yield Action(f"{self.name}/{self.version}", plain(self.spec), ())

    def setup(self) -> None:
        """Nothing to set up."""

    def run(self, action: Action, store: Store, out: Path) -> Record:
        """Loads and saves it; raises Refused where hub or file do not give it, or the file is not the key's."""
        from unclip.clip.model import Clip

        if self.spec.sha256 and _digest(self.how.file) != self.spec.sha256:
            raise Refused(f"{self.how.file} was changed while this run went on: run it again", code=5)
        if self.spec.name == PREFIX:
            clip = Clip.pretrained(self.how.file)
        else:
            clip = Clip.pretrained(self.spec.name, self.how.file or self.spec.tag)
        clip.save(out)
        return Record.of(action, out, facts={"fingerprint": clip.fingerprint})


def _digest(file: str) -> str:
    """SHA-256 (hex) of a file's bytes; of a folder that open_clip names so, over its two files'."""
    with blaming("clip.pretrained.name"):
        files = files_of(file)
    return digest_file(Path(file)) if files is None else digest(canonical([digest_file(one) for one in files]))
