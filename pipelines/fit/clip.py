"""A CLIP that no fit of the run makes: loaded from open_clip, or taken from a release as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from infra.documents import canonical, digest, digest_file
from infra.errors import Refused
from infra.records import Action, Manifest, Record, materialise
from infra.store import Store
from pipelines.stage import StageBase, error_context, plain
from unclip.clip import PREFIX, files_of


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
class LoadClip(StageBase):
    """Takes a CLIP from open_clip's hub or from a file and stores it as this pipeline's CLIP.

    It runs in the driver, where the file's digest was taken: the same path on another node may be another file.
    """

    spec: LoadSpec
    how: LoadHow = field(default_factory=LoadHow)
    name = group = role = "clip"
    needs = ()

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
        yield self.action(plain(self.spec), ())

    def run(self, action: Action, store: Store, out: Path) -> Record:
        """Loads and saves it; raises Refused where hub or file do not give it, or the file is not the key's."""
        from unclip.clip import Clip

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
    with error_context("clip.pretrained.name"):
        files = files_of(file)
    return digest_file(Path(file)) if files is None else digest(canonical([digest_file(one) for one in files]))


CLIP = "clip/"


@dataclass(frozen=True)
class TakeSpec:
    """Whose CLIP, and what it has to be."""

    release: str
    """Version of the release."""
    model: dict[str, Any]
    """open_clip's configuration, as the recipe says it."""


@dataclass(frozen=True)
class TakeClip(StageBase):
    """Takes a release's CLIP, byte for byte, as this pipeline's: what starts from that release needs this very one."""

    spec: TakeSpec
    how = None
    name = group = role = "clip"
    needs = ()

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        """One in all; it reads no data."""
        yield self.action(plain(self.spec), ())

    def run(self, action: Action, store: Store, out: Path) -> Record:
        """Copies it; raises Refused where the recipe describes another one."""
        from unclip.clip import Clip

        bundle = Manifest.load(store, self.spec.release, "bundle").only
        files = {name.removeprefix(CLIP): file for name, file in bundle.files.items() if name.startswith(CLIP)}
        materialise(store, Record(action.key, 0, files, 0, {}, (), {}), out)
        clip = Clip.load(out)
        if clip.config != json.loads(json.dumps(self.spec.model)):
            raise Refused(
                f"clip.model is not the configuration of the CLIP of release {self.spec.release[:12]}, which is "
                f"{json.dumps(clip.config)}"
            )
        return Record.of(action, out, facts={"fingerprint": clip.fingerprint})
