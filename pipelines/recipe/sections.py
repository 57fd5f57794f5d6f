"""Sections of a recipe: each is a stage's spec (in its key) and its how (in no key) side by side.

A field that is not the recipe's to say is repeated with `init=False`: it follows from other numbers, or is found out.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, Union

import pydantic

from infra.errors import Refused
from pipelines.download import DownloadHow, DownloadSpec
from pipelines.embed import EmbedHow, EmbedSpec
from pipelines.evaluate import EvaluateSpec
from pipelines.fit import LoadHow, LoadSpec
from pipelines.recipe.partial import DERIVED, part, partial
from pipelines.select.rules import RULES, Rule
from pipelines.source import Columns, SourceSpec
from pipelines.stage import PoolHow
from training.job import FitHow
from training.options import (
    AutoregressivePriorTrain,
    ClassifierTrain,
    ClipTrain,
    DecoderTrain,
    InpainterTrain,
    NoisedClipTrain,
    PriorTrain,
    UpsamplerTrain,
)
from unclip.clip import ClipConfig
from unclip.config import COUNT, FRACTION, SEED, WHOLE, outside
from unclip.diffusion import Sampling
from unclip.models import AutoregressivePriorConfig, DecoderConfig, HalfUNetConfig, PriorConfig, UpsamplerConfig


def _as_written(value: Any) -> Any:
    pydantic.TypeAdapter(ClipConfig).validate_json(json.dumps(value), strict=True)
    return value


class AnyRule:
    """Marks a rule: one of `RULES` as that list is when a recipe is read, those of plug-ins included."""

    @property
    def choices(self) -> Any:
        """The type of any rule."""
        return Union[tuple(RULES)]  # noqa: UP007

    def __get_pydantic_core_schema__(self, source: Any, handler: pydantic.GetCoreSchemaHandler) -> Any:
        return handler.generate_schema(Annotated[self.choices, pydantic.Discriminator("rule")])


NOT_SAID = {"how": True}
"""Metadata of a field that is not the recipe's to say: it is left out of the recipe that MLflow gets."""

if TYPE_CHECKING:
    OpenClip: TypeAlias = dict[str, Any]
    Rules: TypeAlias = tuple[Rule, ...]
else:
    OpenClip = Annotated[ClipConfig, pydantic.PlainValidator(_as_written)]
    """open_clip's configuration: checked as a ClipConfig, and kept as the dict that was written, which is in CLIP's
    key."""
    Rules = tuple[Annotated[Union[tuple(RULES)], AnyRule()], ...]  # noqa: UP007


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
class Source:
    """Where the samples come from: just one of the last four, or a world's list."""

    rows_per_shard: int = SourceSpec.rows_per_shard
    layout: str | None = None
    """A known data set, whose columns it names."""
    columns: partial(Columns) | None = None  # type: ignore[valid-type]
    urls: str | None = None
    tars: str | None = None
    folder: str | None = None
    uri: str | None = None
    """kind://location, for a kind that a plug-in adds to `pipelines.source.kinds.SOURCES`."""

    def __post_init__(self) -> None:
        SourceSpec(rows_per_shard=self.rows_per_shard)


@dataclass(frozen=True)
class Download(DownloadHow, DownloadSpec):
    """What is fetched, and what is kept of it."""

    block_sha256: str = field(default="", init=False, metadata=NOT_SAID)

    def __post_init__(self) -> None:
        part(self, DownloadSpec)
        part(self, DownloadHow)


@dataclass(frozen=True)
class Select:
    """Rules, applied in order; a row is marked with the first that rejects it."""

    rules: Rules = ()


@dataclass(frozen=True)
class Embed(EmbedHow, EmbedSpec):
    """What CLIP sees, and who computes it."""

    def __post_init__(self) -> None:
        part(self, EmbedSpec)
        part(self, EmbedHow)


@dataclass(frozen=True)
class Fit(FitHow):
    """What all fits share."""

    peak_tflops: float = field(default=FitHow.peak_tflops, init=False, metadata=NOT_SAID)
    start: str | None = None
    """A version of a release (its first digits) whose model of this section the fit goes on from; of `clip` without
    `train`, whose CLIP is taken as it is."""
    accelerator: str | None = None
    """The kind of `hardware` that it runs on, for the metric `mfu`."""


@dataclass(frozen=True)
class Pretrained(LoadHow, LoadSpec):
    """A CLIP that exists."""

    sha256: str = field(default="", init=False, metadata=NOT_SAID)


@dataclass(frozen=True)
class Clip(Fit):
    """CLIP: trained, loaded, or taken from a release."""

    model: OpenClip | None = None
    train: ClipTrain | None = None
    pretrained: Pretrained | None = None


def _changes(config: type, *derived: str) -> Any:
    """What a recipe may change of a preset's model: every field that is not derived, none of them required."""
    return partial(config, DERIVED | {*derived}) | None


# Both read what their decoder draws, under its noise.
ENCODER: TypeAlias = _changes(HalfUNetConfig, "schedule", "timesteps")  # type: ignore[valid-type]


@dataclass(frozen=True, kw_only=True)
class Prior(Fit):
    """The diffusion prior."""

    model: _changes(PriorConfig) = None  # type: ignore[valid-type]
    train: PriorTrain


@dataclass(frozen=True, kw_only=True)
class ArPrior(Fit):
    """The autoregressive prior."""

    model: _changes(AutoregressivePriorConfig) = None  # type: ignore[valid-type]
    train: AutoregressivePriorTrain


@dataclass(frozen=True, kw_only=True)
class Decoder(Fit):
    """The decoder."""

    model: _changes(DecoderConfig) = None  # type: ignore[valid-type]
    train: DecoderTrain


@dataclass(frozen=True, kw_only=True)
class Inpainter(Fit):
    """The inpainter, whose model is the decoder's."""

    train: InpainterTrain


@dataclass(frozen=True, kw_only=True)
class Upsampler(Fit):
    """One upsampler."""

    model: _changes(UpsamplerConfig) = None  # type: ignore[valid-type]
    train: UpsamplerTrain


@dataclass(frozen=True, kw_only=True)
class Classifier(Fit):
    """The noised classifier."""

    labels: tuple[str, ...]
    model: ENCODER = None
    train: ClassifierTrain


@dataclass(frozen=True, kw_only=True)
class NoisedClip(Fit):
    """The noised CLIP."""

    model: ENCODER = None
    train: NoisedClipTrain


@dataclass(frozen=True)
class Sampler:
    """How the released models are sampled unless the caller says otherwise."""

    decoder: Sampling
    upsamplers: dict[int, Sampling]
    prior: Sampling | None = None
    """Said if and only if there is a prior."""


@dataclass(frozen=True)
class Evaluate(PoolHow, EvaluateSpec):
    """What is asked of the release, and who draws it."""

    prompts: str | None = None

    def __post_init__(self) -> None:
        part(self, EvaluateSpec)
        part(self, PoolHow)


@dataclass(frozen=True)
class Release:
    """The model line that a run promotes to."""

    name: str = "unclip"
    """Ledger and registered model of that name."""


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


SECTIONS: dict[str, type] = {}
"""Sections that plug-ins add, by their key: dataclasses, of which `Recipe.sections` has what the recipe says."""
