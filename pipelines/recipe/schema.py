"""Recipes: YAML, checked strictly against the dataclasses that the floors below configure themselves with.

The one room of pydantic. A section is the stage's spec (which is in its key) and its how (which is not), side by side:
`download.size` and `download.threads`. A number is written once: widths come from CLIP, the decoder's side from
`embed.base`, each upsampler's low side from the model before it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_type_hints

import pydantic

from infra.documents import SCHEMA_VERSION
from infra.errors import Refused
from pipelines.download import DownloadHow, DownloadSpec
from pipelines.embed import EmbedHow, EmbedSpec
from pipelines.evaluate import EvaluateSpec
from pipelines.fit import Accelerator, LoadHow, LoadSpec
from pipelines.promote import GateSpec
from pipelines.recipe import yaml as document
from pipelines.recipe.errors import explain
from pipelines.recipe.kinds import asked
from pipelines.recipe.partial import changes, optional, said, section
from pipelines.select.rules import RULES
from pipelines.source import Columns, SourceHow, SourceSpec, columns_of
from pipelines.stage import PoolHow
from training.job import FitHow
from training.options import KINDS
from unclip.clip import ClipConfig
from unclip.config import COUNT, FRACTION, SEED, SIDE, WHOLE, outside
from unclip.diffusion import Sampling
from unclip.models import AutoregressivePriorConfig, DecoderConfig, HalfUNetConfig, PriorConfig, UpsamplerConfig
from unclip.presets import PRESETS

FOLDER = Path(__file__).parent / "library"


def _as_written(value: Any) -> Any:
    pydantic.TypeAdapter(ClipConfig).validate_json(json.dumps(value), strict=True)
    return value


OpenClip = Annotated[ClipConfig, pydantic.PlainValidator(_as_written)]
"""open_clip's configuration: checked as a ClipConfig, and kept as the dict that was written, which is in CLIP's key."""

Rules = tuple[Annotated[Union[RULES], pydantic.Discriminator("rule")], ...]  # type: ignore[valid-type]  # noqa: UP007

(
    CLIP_TRAIN,
    PRIOR_TRAIN,
    AR_PRIOR_TRAIN,
    DECODER_TRAIN,
    INPAINTER_TRAIN,
    UPSAMPLER_TRAIN,
    CLASSIFIER_TRAIN,
    NOISED_CLIP_TRAIN,
) = (
    section(f"{kind} train", KINDS[kind].options)
    for kind in ("clip", "prior", "ar_prior", "decoder", "inpainter", "upsampler", "classifier", "noised_clip")
)

PRETRAINED = section("pretrained", LoadSpec, LoadHow, drop={"sha256"})


START = optional(str)
"""A version of a release (its first digits) whose model of this section the fit goes on from; of `clip` without
`train`, whose CLIP is taken as it is."""


def _fit(name: str, **more: Any) -> Any:
    """A section of a fit. `accelerator`: the kind of `hardware` that it runs on, for the metric `mfu`."""
    return section(name, FitHow, drop={"peak_tflops"}, start=START, accelerator=optional(str), **more)


@dataclass(frozen=True)
class World:
    """A world of made-up pictures that is served on loopback while a run downloads from it."""

    module: str
    """A Python module with `write_list`, `write_prompts` and a `server` beside it (see pipelines/world.py)."""
    pictures: int
    """Rows of the list."""
    pairs: float = 0.3
    """Share of pictures with two objects."""
    seed: int = 0
    """Seed of the list."""
    single_prompts: int = 500
    """Held-out prompts with one object, for the evaluation."""
    pair_prompts: int = 300
    """Held-out prompts with two objects."""
    labels: bool = False
    """Whether its list has columns that say what is to be seen (shape, colour, …), for a classifier to learn."""

    def __post_init__(self) -> None:
        counts = {"pictures": COUNT, "single_prompts": WHOLE, "pair_prompts": WHOLE}
        if wrong := outside(self, **counts, pairs=FRACTION, seed=SEED):
            raise Refused(wrong)
        if not re.fullmatch(r"\w+(\.\w+)*", self.module):
            raise Refused(f"module is {self.module!r}; name a Python module, such as pipelines.shapes")
        if not self.single_prompts + self.pair_prompts:
            raise Refused("single_prompts and pair_prompts are 0; an evaluation needs prompts")


@dataclass(frozen=True)
class Release:
    """The model line that a run promotes to."""

    name: str = "unclip"
    """Ledger and registered model of that name."""


@dataclass(frozen=True)
class Select:
    """Rules, applied in order; a row is marked with the first that rejects it."""

    rules: Rules = ()


@dataclass(frozen=True)
class Tracking:
    """MLflow."""

    uri: str | None = None
    """Tracking server; default MLFLOW_TRACKING_URI, else SQLite beside the store."""
    experiment: str = "unclip"
    required: bool = True
    """Whether a server that does not answer at the start is an error."""

    def __post_init__(self) -> None:
        for name in ("uri", "experiment"):
            if getattr(self, name) == "":
                raise Refused(f"{name} is empty; name one, or leave it out")


@dataclass(frozen=True)
class Cluster:
    """Ray."""

    cpus: int | None = None
    """CPUs that a local Ray may use; default all."""
    dashboard: bool = True
    """Whether a local Ray has its dashboard: a dozen processes, on loopback, some seconds of a core to start."""

    def __post_init__(self) -> None:
        if wrong := outside(self, cpus=COUNT):
            raise Refused(wrong)


@dataclass(frozen=True)
class Sampler:
    """How the released models are sampled unless the caller says otherwise."""

    decoder: Sampling
    upsamplers: dict[int, Sampling]
    prior: Sampling | None = None
    """Said if and only if there is a prior."""


if typing.TYPE_CHECKING:  # sections are made at import, which no type checker can follow
    Source: typing.TypeAlias = Any
    Download: typing.TypeAlias = Any
    Embed: typing.TypeAlias = Any
    Clip: typing.TypeAlias = Any
    Prior: typing.TypeAlias = Any
    ArPrior: typing.TypeAlias = Any
    Decoder: typing.TypeAlias = Any
    Inpainter: typing.TypeAlias = Any
    Upsampler: typing.TypeAlias = Any
    Classifier: typing.TypeAlias = Any
    NoisedClip: typing.TypeAlias = Any
    Evaluate: typing.TypeAlias = Any
else:
    Source = section(
        "source",
        SourceSpec,
        drop={"columns"},
        layout=optional(str),
        columns=optional(section("source columns", Columns, partial=True)),
        **{name: optional(str) for name in ("urls", "tars", "folder")},
    )
    Download = section("download", DownloadSpec, DownloadHow, drop={"block_sha256"})
    Embed = section("embed", EmbedSpec, EmbedHow)
    Clip = _fit("clip", model=optional(OpenClip), train=optional(CLIP_TRAIN), pretrained=optional(PRETRAINED))
    Prior = _fit("prior", model=changes(PriorConfig), train=(PRIOR_TRAIN, field()))
    ArPrior = _fit("ar_prior", model=changes(AutoregressivePriorConfig), train=(AR_PRIOR_TRAIN, field()))
    Decoder = _fit("decoder", model=changes(DecoderConfig), train=(DECODER_TRAIN, field()))
    Inpainter = _fit("inpainter", train=(INPAINTER_TRAIN, field()))
    Upsampler = _fit("upsampler", model=changes(UpsamplerConfig), train=(UPSAMPLER_TRAIN, field()))
    # Both read what their decoder draws, under its noise.
    ENCODER = changes(HalfUNetConfig, "schedule", "timesteps")
    Classifier = _fit("classifier", labels=(tuple[str, ...], field()), model=ENCODER, train=(CLASSIFIER_TRAIN, field()))
    NoisedClip = _fit("noised_clip", model=ENCODER, train=(NOISED_CLIP_TRAIN, field()))
    Evaluate = section("evaluate", EvaluateSpec, PoolHow, drop={"prompts"}, prompts=optional(str))


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
        where = {name: getattr(self.source, name) for name in ("urls", "tars", "folder")}
        if "" in where.values() or self.world is None or any(where.values()):
            SourceHow(**where)

    @property
    def columns(self) -> Columns:
        """What the source's columns are called: what `source.columns` says, for the rest what its layout does."""
        return columns_of(self.source.layout, said(self.source.columns))

    def section(self, name: str) -> Any:
        """The section of that name, or None."""
        return getattr(self, name)

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


def load(name: str, changes: typing.Sequence[str] = ()) -> Recipe:
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


def parse(read: dict[str, Any], where: str) -> Recipe:
    """A recipe from a plain document."""
    document.check(read, f"Recipe {where}")
    try:
        return _ADAPTER.validate_json(json.dumps(read), strict=True)
    except pydantic.ValidationError as error:
        raise Refused(explain(error.errors(), Recipe, where)) from None


def _forbid(hint: Any, seen: set[Any]) -> None:
    """Marks every dataclass below `hint`: unknown keys are errors."""
    if dataclasses.is_dataclass(hint) and hint not in seen:
        seen.add(hint)
        hint.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[union-attr]
        for inner in get_type_hints(hint, include_extras=False).values():
            _forbid(inner, seen)
    for inner in get_args(hint):
        _forbid(inner, seen)


_forbid(Recipe, set())
_ADAPTER: pydantic.TypeAdapter[Recipe] = pydantic.TypeAdapter(Recipe)
