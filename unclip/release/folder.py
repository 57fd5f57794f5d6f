"""A release folder: every model of one unCLIP, how to sample it, and what it was made from.

    release.json                            name, components with the SHA-256 of each file, sampling, data, CLIP
    clip/config.json merges.txt model.safetensors
    prior/config.json model.safetensors     decoder/ and upsampler-<side>/ likewise; inpainter/, classifier/ and
                                            noised-clip/ if any
    prior/gamma.safetensors                 where the prior's γ was measured, for Analytic-DPM

Only files that release.json names are read, and they are JSON, text and safetensors: no code of a folder ever runs.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from unclip.clip import MERGES, Clip, clip_widths
from unclip.config import mistyped
from unclip.diffusion import Sampling, check_sampling
from unclip.errors import Damaged, Refused
from unclip.files import CONFIG, WEIGHTS, explain_document, read_json, write_json
from unclip.models import AutoregressivePriorConfig, Decoder, Prior, Upsampler
from unclip.release.compatibility import check_fit, check_guides
from unclip.release.guides import GUIDES, Guides, check_asked
from unclip.release.model import GAMMA, kinds_of, load_gamma, load_model, read_model_config

MANIFEST = "release.json"
UPSAMPLER = "upsampler-"


@dataclass(frozen=True)
class Part:
    """What one component of a release is. Which kinds of model can be it says `model.KINDS`."""

    required: bool = True
    """Whether a release is none without it."""
    sampled: bool = True
    """Whether the release says how to sample it."""
    sees_clip: bool = True
    """Whether it was trained on CLIP's embeddings: then it belongs to one CLIP."""
    extras: tuple[str, ...] = ()
    """Files that may stand beside its own."""


PARTS = {
    "clip": Part(sampled=False, sees_clip=False),
    # The decoder's configuration says whether there is a prior (`check_fit`).
    "prior": Part(required=False, extras=(GAMMA,)),
    "decoder": Part(),
    "inpainter": Part(required=False, sampled=False),  # sampled as the decoder is
    "classifier": Part(required=False, sampled=False, sees_clip=False),
    "noised-clip": Part(required=False, sampled=False),
}
"""The components that a release has one of, by name."""
UPSAMPLERS = Part(required=False, sees_clip=False)
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


def save_release(
    folder: Path | str,
    name: str,
    components: Mapping[str, Path],
    sampling: Mapping[str, Sampling],
    data: Mapping[str, str] | None = None,
) -> Release:
    """Makes a release of model folders and returns what `check_release` says of it.

    components: "clip", "prior", "decoder", each "upsampler-<side>" and, if there is one, "inpainter" → a folder that
    Clip.save or save_model wrote; no "prior" for a decoder that draws from prompts alone. Files are linked where the
    file system allows, else copied. Raises Refused where the parts do not fit together.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digests: dict[str, dict[str, str]] = {}
    for component, source in sorted(components.items()):
        _check_name(component, "the components of a release")
        target = folder / component
        target.mkdir()
        digests[component] = {}
        for file in (*_files(component), *_part(component).extras):
            if not (Path(source) / file).is_file():
                if file in _part(component).extras:
                    continue
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
    return check_release(folder)


def read_release(folder: Path | str) -> Release:
    """What release.json says, its form checked but no other file opened."""
    path = Path(folder) / MANIFEST
    document = read_json(path, "release")
    with explain_document(path, "release"):
        return _parsed(path, document)


def _parsed(path: Path, document: dict[str, Any]) -> Release:
    known = {field.name for field in fields(Release)} | {"schema_version"}
    if set(document) != known:
        raise Refused(f"{path} has the entries {sorted(document)}, and a release has {sorted(known)}")
    for component, files in document["components"].items():
        _check_name(component, str(path))
        if set(files) - set(_part(component).extras) != set(_files(component)):
            raise Refused(f"{path}: {component} lists {sorted(files)}, and it consists of {sorted(_files(component))}")
    needed = {name for name, part in PARTS.items() if part.required} | set(document["sampling"]) & set(PARTS)
    if missing := sorted(needed - set(document["components"])):
        raise Refused(f"{path} has no {' and no '.join(missing)}; a release has clip, prior, decoder and upsamplers")
    sampled = {name for name in document["components"] if _part(name).sampled}
    if set(document["sampling"]) != sampled:
        raise Refused(f"{path} says how to sample {sorted(document['sampling'])}, and its models are {sorted(sampled)}")
    for component, settings in document["sampling"].items():
        told = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        if wrong := mistyped(Sampling, told):
            raise Refused(f"{path}: sampling of {component}: {wrong}")
    try:
        sampling = {component: Sampling(**settings) for component, settings in document["sampling"].items()}
    except TypeError as error:
        raise Refused(f"{path} has sampling settings that this unclip does not know: {error}") from None
    return Release(str(document["name"]), document["components"], sampling, document["data"], str(document["clip"]))


def decoder_settings(folder: Path | str, **changes: Any) -> Sampling:
    """A release's settings of its decoder, with what the caller changes of them (None: nothing).

    Reads no tensor. Raises Refused for impossible settings, and for a guide or a class that the release does not have.
    """
    folder, release = Path(folder), read_release(folder)
    said = {name: value for name, value in changes.items() if value is not None}
    settings = replace(release.sampling["decoder"], **said)
    there = (name for name in GUIDES if name in release.components)
    check_asked(settings, {name: read_model_config(folder / name, *_kinds(name))[0] for name in there})
    return settings


def check_release(folder: Path | str) -> Release:
    """Checks every digest and that the parts fit: widths, sides, fingerprints. Raises Refused naming both sides."""
    folder = Path(folder)
    release = read_release(folder)
    for component, files in release.components.items():
        for file, expected in files.items():
            path = folder / component / file
            if not path.is_file():
                raise Damaged(f"{path} is missing: the release {release.name!r} in {folder} is incomplete")
            if (found := _digest(path)) != expected:
                raise Damaged(
                    f"{path} was altered: its SHA-256 is {found[:12]}…, and {MANIFEST} says {str(expected)[:12]}…. "
                    "Take an undamaged copy of the release."
                )
    document = read_json(folder / "clip" / CONFIG, "CLIP")
    with explain_document(folder / "clip" / CONFIG, "configuration of a CLIP"):
        clip, widths = str(document["fingerprint"]), clip_widths(document["model"])
    if clip != release.clip:
        raise Refused(f"{folder} was released with the CLIP {release.clip[:12]}…, and holds the CLIP {clip[:12]}…")
    configs: dict[str, Any] = {}
    for component in sorted(set(release.components) - {"clip"}):
        part = _part(component)
        configs[component], trained_on = read_model_config(folder / component, *_kinds(component))
        if part.sees_clip and trained_on != clip:
            raise Refused(
                f"the {component} in {folder} was trained on embeddings of the CLIP {str(trained_on)[:12]}…, "
                f"and the release holds the CLIP {clip[:12]}…: their embeddings mean different things"
            )
    for name in release.upsamplers:
        if configs[name].size != _side(name):
            raise Refused(f"{folder / name} holds an upsampler to {configs[name].size} px")
    for component, settings in release.sampling.items():
        written = isinstance(configs[component], AutoregressivePriorConfig)
        measured = GAMMA in release.components[component]
        if measured and written:
            raise Refused(f"{folder / component} holds {GAMMA} beside an autoregressive prior, which has no variances")
        if measured:
            load_gamma(folder / component, configs[component].timesteps)
        check_sampling(component, settings, written=written, gamma=measured)
    upsamplers = [configs[name] for name in release.upsamplers]
    check_fit(widths, configs.get("prior"), configs["decoder"], upsamplers, configs.get("inpainter"))
    guides = {name: configs[name] for name in GUIDES if name in configs}
    check_guides(configs["decoder"], widths["embedding"], guides)
    check_asked(release.sampling["decoder"], guides)
    return release


@dataclass(frozen=True)
class Models:
    """The models of a release, loaded, as `unclip.UnCLIP` takes them."""

    clip: Clip
    prior: Prior | None
    decoder: Decoder
    upsamplers: list[Upsampler]
    """Smallest output first."""
    sampling: dict[str, Sampling]
    guides: Guides
    gamma: dict[str, Tensor]
    """E‖ε̂‖²/d by timestep [T], by component, of those that Analytic-DPM samples."""
    inpainter: Decoder | None


def load_models(folder: Path | str) -> Models:
    """Checks a release and loads its models, on the host. Raises Refused as `check_release` does."""
    folder = Path(folder)
    release = check_release(folder)
    clip = Clip.load(folder / "clip")
    models: dict[str, Any] = {
        name: load_model(folder / name, *_kinds(name)) for name in release.components if name != "clip"
    }
    gamma = {
        name: load_gamma(folder / name, models[name].config.timesteps)
        for name, files in release.components.items()
        if GAMMA in files
    }
    return Models(
        clip,
        models.get("prior"),
        models["decoder"],
        [models[name] for name in release.upsamplers],
        release.sampling,
        Guides(models.get("classifier"), models.get("noised-clip")),
        gamma,
        models.get("inpainter"),
    )


def _files(component: str) -> tuple[str, ...]:
    return (CONFIG, MERGES, WEIGHTS) if component == "clip" else (CONFIG, WEIGHTS)


def _side(component: str) -> int:
    return int(component.removeprefix(UPSAMPLER))


def _kinds(component: str) -> tuple[str, ...]:
    """Kinds of model folder that can be that component; none for CLIP, whose folder is of its own form."""
    return kinds_of("upsampler" if component.startswith(UPSAMPLER) else component)


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
