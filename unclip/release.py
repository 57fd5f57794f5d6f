"""A release folder: every model of one unCLIP, how to sample it, and what it was made from.

    release.json                            name, components with the SHA-256 of each file, sampling, data, CLIP
    clip/config.json merges.txt model.safetensors
    prior/config.json model.safetensors     decoder/ and upsampler-<side>/ likewise

Only files that release.json names are read, and they are JSON, text and safetensors: no code of a folder ever runs.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from unclip.cascade import Sampling, UnCLIP
from unclip.clip import MERGES, Clip, clip_widths
from unclip.errors import Refused
from unclip.fit import check_fit
from unclip.folder import CONFIG, PRIORS, WEIGHTS, load_model, read_json, read_model_config, write_json

MANIFEST = "release.json"
UPSAMPLER = "upsampler-"


@dataclass(frozen=True)
class Part:
    """What one component of a release is."""

    kinds: tuple[str, ...] = ()
    """Kinds of model folder that can be it (unclip/folder.py); none for CLIP, whose folder is of its own form."""
    required: bool = True
    """Whether a release is none without it."""
    sampled: bool = True
    """Whether the release says how to sample it."""
    sees_clip: bool = True
    """Whether it was trained on CLIP's embeddings: then it belongs to one CLIP."""


PARTS = {
    "clip": Part(sampled=False, sees_clip=False),
    "prior": Part(PRIORS),
    "decoder": Part(("decoder",)),
}
"""The components that a release has one of, by name."""
UPSAMPLERS = Part(("upsampler",), required=False, sees_clip=False)
"""Those that it has any number of: each `upsampler-<side>`."""


@dataclass(frozen=True)
class Release:
    """What release.json says."""

    name: str
    """The model line, for instance "unclip"."""
    components: dict[str, dict[str, str]]
    """"clip", "prior", "decoder", "upsampler-64", … → file name → SHA-256."""
    sampling: dict[str, Sampling]
    """How each sampled component is sampled unless the caller says otherwise."""
    data: dict[str, str]
    """Versions of what it was made from, by stage; nothing here is read by unclip."""
    clip: str
    """CLIP's fingerprint."""

    @property
    def upsamplers(self) -> list[str]:
        """Names of the upsamplers, smallest output first."""
        return sorted((name for name in self.components if name.startswith(UPSAMPLER)), key=_side)


def save(
    folder: Path | str,
    name: str,
    components: Mapping[str, Path],
    sampling: Mapping[str, Sampling],
    data: Mapping[str, str] | None = None,
) -> Release:
    """Makes a release of model folders and returns what `check` says of it.

    components: "clip", "prior", "decoder" and each "upsampler-<side>" → a folder that Clip.save or save_model wrote.
    Files are linked where the file system allows, else copied. Raises Refused where the parts do not fit together.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digests: dict[str, dict[str, str]] = {}
    for component, source in sorted(components.items()):
        _check_name(component, "the components of a release")
        target = folder / component
        target.mkdir()
        digests[component] = {}
        for file in _files(component):
            if not (Path(source) / file).is_file():
                raise Refused(f"{component}: {source} has no {file}, so it cannot become part of a release")
            _place(Path(source) / file, target / file)
            digests[component][file] = _digest(target / file)
    document = {
        "name": name,
        "components": digests,
        "sampling": {component: settings.document() for component, settings in sorted(sampling.items())},
        "data": dict(sorted((data or {}).items())),
        "clip": read_json(folder / "clip" / CONFIG, "CLIP")["fingerprint"] if "clip" in digests else "",
    }
    write_json(folder / MANIFEST, document)
    return check(folder)


def read(folder: Path | str) -> Release:
    """What release.json says, its form checked but no other file opened."""
    path = Path(folder) / MANIFEST
    document = read_json(path, "release")
    known = {field.name for field in fields(Release)} | {"schema_version"}
    if set(document) != known:
        raise Refused(f"{path} has the entries {sorted(document)}, and a release has {sorted(known)}")
    for component, files in document["components"].items():
        _check_name(component, str(path))
        if set(files) != set(_files(component)):
            raise Refused(f"{path}: {component} lists {sorted(files)}, and it consists of {sorted(_files(component))}")
    if missing := [name for name, part in PARTS.items() if part.required and name not in document["components"]]:
        raise Refused(f"{path} has no {' and no '.join(missing)}; a release has clip, prior, decoder and upsamplers")
    sampled = {name for name in document["components"] if _part(name).sampled}
    if set(document["sampling"]) != sampled:
        raise Refused(f"{path} says how to sample {sorted(document['sampling'])}, and its models are {sorted(sampled)}")
    try:
        sampling = {component: Sampling(**settings) for component, settings in document["sampling"].items()}
    except TypeError as error:
        raise Refused(f"{path} has sampling settings that this unclip does not know: {error}") from None
    return Release(document["name"], document["components"], sampling, document["data"], document["clip"])


def check(folder: Path | str) -> Release:
    """Checks every digest and that the parts fit: widths, sides, fingerprints. Raises Refused naming both sides."""
    folder = Path(folder)
    release = read(folder)
    for component, files in release.components.items():
        for file, expected in files.items():
            path = folder / component / file
            if not path.is_file():
                raise Refused(f"{path} is missing: the release {release.name!r} in {folder} is incomplete")
            if (found := _digest(path)) != expected:
                raise Refused(
                    f"{path} was altered: its SHA-256 is {found[:12]}…, and {MANIFEST} says {expected[:12]}…. "
                    "Take an undamaged copy of the release."
                )
    document = read_json(folder / "clip" / CONFIG, "CLIP")
    clip = document["fingerprint"]
    if clip != release.clip:
        raise Refused(f"{folder} was released with the CLIP {release.clip[:12]}…, and holds the CLIP {clip[:12]}…")
    configs: dict[str, Any] = {}
    for component in sorted(set(release.components) - {"clip"}):
        part = _part(component)
        configs[component], trained_on = read_model_config(folder / component, *part.kinds)
        if part.sees_clip and trained_on != clip:
            raise Refused(
                f"the {component} in {folder} was trained on embeddings of the CLIP {str(trained_on)[:12]}…, "
                f"and the release holds the CLIP {clip[:12]}…: their embeddings mean different things"
            )
    for name in release.upsamplers:
        if configs[name].size != _side(name):
            raise Refused(f"{folder / name} holds an upsampler to {configs[name].size} px")
    widths = clip_widths(document["model"])
    check_fit(widths, configs["prior"], configs["decoder"], [configs[name] for name in release.upsamplers])
    return release


def load(folder: Path | str) -> UnCLIP:
    """Checks a release and loads it, ready to generate, on the host."""
    folder = Path(folder)
    release = check(folder)
    clip = Clip.load(folder / "clip")
    models: dict[str, Any] = {
        name: load_model(folder / name, *_part(name).kinds) for name in release.components if name != "clip"
    }
    upsamplers = [models[name] for name in release.upsamplers]
    return UnCLIP(clip, models["prior"], models["decoder"], upsamplers, release.sampling)


def _files(component: str) -> tuple[str, ...]:
    return (CONFIG, MERGES, WEIGHTS) if component == "clip" else (CONFIG, WEIGHTS)


def _side(component: str) -> int:
    return int(component.removeprefix(UPSAMPLER))


def _part(component: str) -> Part:
    numbered = component.startswith(UPSAMPLER) and component.removeprefix(UPSAMPLER).isdecimal()
    return UPSAMPLERS if numbered else PARTS[component]


def _check_name(component: str, where: str) -> None:
    # A component names a folder, so nothing else may pass: no path out of the release.
    try:
        _part(component)
    except KeyError:
        known = f"{', '.join(PARTS)}, {UPSAMPLER}<side>"
        raise Refused(f"{where}: {component!r} is no part of a release; it has {known}") from None


def _place(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
