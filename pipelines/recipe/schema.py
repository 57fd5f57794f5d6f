"""A recipe as a whole: YAML, checked strictly against the dataclasses that the floors below configure themselves with.

pydantic is used in this room alone. A number is written once: widths come from CLIP, the decoder's side from
`embed.base`, each upsampler's low side from the model before it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pydantic

from infra.documents import SCHEMA_VERSION
from infra.errors import Refused
from infra.plugins import load_plugins
from pipelines.fit import Accelerator
from pipelines.promote import GateSpec
from pipelines.recipe import yaml as document
from pipelines.recipe.errors import explain
from pipelines.recipe.kinds import asked
from pipelines.recipe.partial import said
from pipelines.recipe.renamed import rename
from pipelines.recipe.sections import (
    SECTIONS,
    ArPrior,
    Classifier,
    Clip,
    Cluster,
    Decoder,
    Download,
    Embed,
    Evaluate,
    Inpainter,
    NoisedClip,
    Prior,
    Release,
    Sampler,
    Select,
    Source,
    Tracking,
    Upsampler,
    World,
)
from pipelines.select.rules import RULES
from pipelines.source import Columns, SourceHow, columns_of
from unclip.config import LATER, SIDE
from unclip.presets import PRESETS

FOLDER = Path(__file__).parent / "library"


@dataclass(frozen=True)
class Recipe:
    """A whole run, from the URL list to the promoted release."""

    schema_version: int
    models: str
    """The preset (unclip/presets.py) that `prior.model`, `decoder.model` and `upsamplers.N.model` change."""
    clip: Clip
    decoder: Decoder
    upsamplers: dict[int, Upsampler]
    """By the side of their output in pixels."""
    sampling: Sampler
    embed: Embed
    prior: Prior | None = None
    """The diffusion prior."""
    ar_prior: ArPrior | None = None
    """The autoregressive prior, in the diffusion prior's place."""
    inpainter: Inpainter | None = None
    """Trains the finished decoder on, to fill in: an optional part of the release, which `edit inpaint` then uses."""
    classifier: Classifier | None = None
    """A noised classifier of label columns (each in `source.columns.keep`), for classifier guidance."""
    noised_clip: NoisedClip | None = None
    """A noised CLIP, for CLIP guidance."""
    download: Download = field(default_factory=Download)
    source: Source = field(default_factory=Source)
    filter: Select = field(default_factory=Select)
    curate: Select = field(default_factory=Select)
    evaluate: Evaluate = field(default_factory=Evaluate)
    gate: GateSpec = field(default_factory=GateSpec)
    release: Release = field(default_factory=Release)
    world: World | None = None
    tracking: Tracking = field(default_factory=Tracking)
    cluster: Cluster = field(default_factory=Cluster)
    hardware: dict[str, Accelerator] = field(default_factory=dict)
    """Kinds of accelerators by name: `unclip plan` says how long each fit takes on them, and for what price."""
    plugins: tuple[str, ...] = field(default=(), metadata=LATER)
    """Modules that are imported first, here and in every worker, and add to the product's tables (docs/extend.md)."""
    sections: Mapping[str, Any] = field(default_factory=dict, init=False, metadata={"how": True})
    """What the recipe says in sections that plug-ins added (`SECTIONS`), by their keys."""

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise Refused(f"schema_version {self.schema_version} is unknown; this unclip reads {SCHEMA_VERSION}")
        if (self.clip.pretrained is None) == (self.clip.model is None):
            raise Refused("clip: give either `model` and `train` (to train one) or `pretrained` (to load one)")
        if self.clip.model is not None and self.clip.train is None and self.clip.start is None:
            raise Refused("clip: `model` is given without `train`, or `start` to take a release's CLIP as it is")
        if self.clip.pretrained is not None and self.clip.start is not None:
            raise Refused("clip: `start` is for `model`; leave out `pretrained`")
        vision = {} if self.clip.model is None else self.clip.model["vision_cfg"]
        if self.clip.workers > 1 and isinstance(vision.get("layers"), list):
            raise Refused(
                f"clip.workers is {self.clip.workers}, and a ResNet's batch norms would see each worker's samples "
                "alone; use 1 worker, or a vision transformer"
            )
        priors = 2 - [self.prior, self.ar_prior].count(None)
        if self.prompts_only and (priors or self.sampling.prior is not None):
            raise Refused(
                "this decoder draws from prompts alone (its image is false): leave out `prior`, `ar_prior` and "
                "`sampling.prior`"
            )
        if not self.prompts_only and priors != 1:
            raise Refused("give either `prior` (a diffusion prior) or `ar_prior` (an autoregressive one)")
        if not self.prompts_only and self.sampling.prior is None:
            raise Refused("sampling.prior is missing")
        if set(self.sampling.upsamplers) != set(self.upsamplers):
            raise Refused(
                f"sampling.upsamplers names {sorted(self.sampling.upsamplers)} px, "
                f"upsamplers {sorted(self.upsamplers)} px"
            )
        kept = self.columns.keep
        if self.classifier is not None:
            if not self.classifier.labels:
                raise Refused("classifier.labels is empty: name a column that says what a picture shows")
            if missing := sorted({*self.classifier.labels} - {*kept}):
                raise Refused(
                    f"classifier.labels names {', '.join(missing)}: name it in source.columns.keep as well, so that it "
                    "travels with the rows"
                )
        learned = () if self.classifier is None else self.classifier.labels
        if missing := sorted({*self.sampling.decoder.labels} - {*learned}):
            raise Refused(f"sampling.decoder.labels has {missing[0]}, which `classifier.labels` does not name")
        if self.sampling.decoder.clip_guidance and self.noised_clip is None:
            raise Refused("sampling.decoder.clip_guidance needs a noised CLIP: add a section `noised_clip`")
        for side in self.upsamplers:
            if wanted := SIDE.refuses(side):
                raise Refused(f"upsamplers names {side} px; a side must be {wanted}")
        for one in asked(self):
            wanted = one.section.accelerator
            if wanted is not None and wanted not in self.hardware:
                known = ", ".join(sorted(self.hardware)) or "no kind"
                raise Refused(f"{one.path}.accelerator is {wanted!r}, and hardware names {known}")
        where = {name: getattr(self.source, name) for name in ("urls", "tars", "folder", "uri")}
        if "" in where.values() or self.world is None or any(where.values()):
            SourceHow(**where)

    @property
    def columns(self) -> Columns:
        """What the source's columns are called: what `source.columns` says, for the rest what its layout does."""
        return columns_of(self.source.layout, said(self.source.columns))

    def section(self, name: str) -> Any:
        """The section of that name, a plug-in's too, or None."""
        return self.sections[name] if name in self.sections else getattr(self, name, None)

    @property
    def prompts_only(self) -> bool:
        """Whether the decoder draws from prompts alone, so that there is no prior."""
        changed = None if self.decoder.model is None else self.decoder.model.image
        if changed is None and self.models in PRESETS:
            changed = PRESETS[self.models].decoder.image
        return changed is False


def names() -> list[str]:
    """The recipes that come with unclip."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str, changes: Sequence[str] = ()) -> Recipe:
    """A recipe by name or file, with `key=value` changes; raises Refused with the dotted path of what is wrong."""
    path = Path(name)
    try:
        if name and path.is_dir():
            raise Refused(f"{name!r} is a folder; a recipe is a YAML file, or one of: {', '.join(names())}.")
        if not path.suffix and not path.is_file():
            path = FOLDER / f"{name}.yaml"
        found = path.is_file()
    except OSError as error:
        raise Refused(f"There is no recipe {name[:40]!r}…: {error.strerror}.") from None
    if not found:
        near = difflib.get_close_matches(name, names(), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise Refused(f"There is no recipe {name!r}.{hint} Give a YAML file or one of: {', '.join(names())}.")
    read = document.read(path)
    for change in changes:
        document.change(read, change)
    return parse(read, name)


def parse(read: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from a plain document; imports the plug-ins that it names."""
    document.check(read, f"Recipe {where}")
    read = dict(read)
    for notice in rename(read, f"Recipe {where}"):
        sys.stderr.write(f"unclip: {notice}\n")
    named = read.get("plugins")
    load_plugins([name for name in named if isinstance(name, str)] if isinstance(named, list) else ())
    added = {name: read.pop(name) for name in SECTIONS if name in read}
    try:
        recipe = _adapter(Recipe, tuple(RULES)).validate_json(json.dumps(read), strict=True)
    except pydantic.ValidationError as error:
        raise Refused(explain(error.errors(), Recipe, where)) from None
    sections = {name: _section(name, value, where) for name, value in added.items()}
    object.__setattr__(recipe, "sections", sections)  # not an argument, which a recipe could say
    return recipe


def _section(name: str, value: Any, where: str) -> Any:
    """What a recipe says in a section that a plug-in added."""
    try:
        return _adapter(SECTIONS[name], tuple(RULES)).validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError as error:
        errors = [{**one, "loc": (name, *one["loc"])} for one in error.errors()]
        raise Refused(explain(errors, dataclasses.make_dataclass("Added", [(name, SECTIONS[name])]), where)) from None


@functools.cache
def _adapter(root: type, rules: tuple[type, ...]) -> pydantic.TypeAdapter[Any]:
    """What checks a document, with these rules among which it may choose."""
    for cls in (root, *rules):
        _forbid(cls, set())
    return pydantic.TypeAdapter(root)


def _forbid(hint: Any, seen: set[Any]) -> None:
    """Marks every dataclass below `hint`: unknown keys are errors."""
    if dataclasses.is_dataclass(hint) and hint not in seen:
        seen.add(hint)
        hint.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[union-attr]
        for inner in get_type_hints(hint, include_extras=False).values():
            _forbid(inner, seen)
    for inner in get_args(hint):
        _forbid(inner, seen)
