"""From a recipe to its stages: what the workflow of unclip consists of, in one place.

A function a section makes its stages; `STAGES` has them in the order in which a person thinks of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from infra.ledger import Entry
from pipelines.download import Download, DownloadHow, DownloadSpec, Gather, GatherHow, PictureSpec, check_unused
from pipelines.embed import Embed, EmbedHow, EmbedSpec, Statistics
from pipelines.evaluate import Evaluate, EvaluateSample, EvaluateSpec, read_prompts, scores
from pipelines.fit import Fit, FitSpec, Gamma, LoadClip, LoadHow, LoadSpec, TakeClip, TakeSpec, wants_gamma
from pipelines.promote import Gate, Promote
from pipelines.recipe.kinds import Asked, asked
from pipelines.recipe.models import models
from pipelines.recipe.partial import part
from pipelines.recipe.schema import Recipe
from pipelines.release import Bundle, BundleSpec
from pipelines.reports import Count, DataReport, Report
from pipelines.select import FeatureStage, Select
from pipelines.select.rules import Rule, opened
from pipelines.source import Source, SourceHow, SourceSpec
from pipelines.stage import PoolHow, Stage, error_context, plain
from training.job import FitHow
from training.options import KINDS
from unclip.release import KINDS as MODELS


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a recipe reads from outside itself: its lists by path and digest, its prompts, its ledger's head."""

    urls: str | None
    """The URL list; None where the source is tars or a folder."""
    list_digests: tuple[str, ...]
    """`SourceHow.digests` of the source."""
    prompts: str
    head: Entry | None
    starts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What its sections call their `start` → the version of that release."""
    unread: str = ""
    """Why the digests were not taken, which a plan can do without."""


@dataclasses.dataclass(frozen=True)
class Build:
    """A recipe with what it reads, and what several of its stages are made from."""

    recipe: Recipe
    inputs: Inputs
    models: Mapping[str, Any]
    """Stage name → model configuration."""

    @cached_property
    def rules(self) -> dict[str, tuple[Rule, ...]]:
        """filter and curate → their rules, with what they read."""
        given = {"filter": self.recipe.filter.rules, "curate": self.recipe.curate.rules}
        return {group: _opened(group, rules) for group, rules in given.items()}

    @property
    def fits(self) -> list[Asked]:
        """The models that are trained for a release, without CLIP."""
        return [one for one in asked(self.recipe) if one.kind != "clip"]

    @property
    def measured(self) -> bool:
        """Whether the prior's sampling asks for a table that a stage has to measure."""
        prior = self.recipe.sampling.prior
        return self.recipe.prior is not None and prior is not None and wants_gamma(prior)

    @property
    def source(self) -> SourceHow:
        """Where the pictures come from."""
        section = self.recipe.source
        return SourceHow(self.inputs.urls, section.tars, section.folder, section.uri)


def _opened(group: str, rules: Sequence[Rule]) -> tuple[Rule, ...]:
    out = []
    for number, rule in enumerate(rules):
        with error_context(f"{group}.rules.{number}"):
            out.append(opened(rule))
    return tuple(out)


def source(build: Build) -> Iterable[Stage]:
    """The source's slices."""
    recipe, inputs = build.recipe, build.inputs
    spec = SourceSpec(recipe.columns, recipe.source.rows_per_shard)
    yield Source(spec, build.source, inputs.list_digests, inputs.unread)


def download(build: Build) -> Iterable[Stage]:
    """The pictures: fetched, or taken from where the source has them."""
    section, where = build.recipe.download, build.source
    if not where.fetched:
        check_unused(section, f"source.{where.kind}")
        samples = "" if build.inputs.unread else where.samples or ""
        how = GatherHow(samples, section.threads, section.cpus, section.isolate, section.decode_s)
        yield Gather(part(section, PictureSpec), how)
    else:
        yield Download.of(part(section, DownloadSpec), part(section, DownloadHow))


def filtering(build: Build) -> Iterable[Stage]:
    """`filter`: rules about what was downloaded."""
    return _selecting("filter", build)


def curating(build: Build) -> Iterable[Stage]:
    """`curate`: rules about what was embedded, and what there is to be seen of the data then."""
    yield from _selecting("curate", build)
    yield Count()
    yield DataReport({group: plain(rules) for group, rules in build.rules.items()})


def _selecting(group: str, build: Build) -> Iterable[Stage]:
    for stage in (FeatureStage, Select):
        yield stage(group, build.rules[group], build.recipe.columns.keep)


def clip(build: Build) -> Iterable[Stage]:
    """CLIP: loaded, taken from a release, or trained."""
    section = build.recipe.clip
    if section.pretrained is not None:
        yield LoadClip.of(part(section.pretrained, LoadSpec), part(section.pretrained, LoadHow))
    elif section.train is None:
        yield TakeClip(TakeSpec(build.inputs.starts[str(section.start)], section.model or {}))
    else:
        (one,) = (one for one in asked(build.recipe) if one.kind == "clip")
        yield fit(build, one, section.model or {})


def embed(build: Build) -> Iterable[Stage]:
    """What CLIP sees in pictures and captions."""
    yield Embed(part(build.recipe.embed, EmbedSpec), part(build.recipe.embed, EmbedHow))


def statistics(build: Build) -> Iterable[Stage]:
    """Means and components of the embeddings."""
    yield Statistics()


def fits(build: Build) -> Iterable[Stage]:
    """Each model that is trained for the release, and what is measured of them."""
    for one in build.fits:
        yield fit(build, one, plain(build.models[one.stage]))
    if build.measured:
        yield Gamma.beside(build.recipe.prior)


def fit(build: Build, one: Asked, config: dict[str, Any]) -> Fit:
    """The stage that trains one model."""
    section, hardware = one.section, build.recipe.hardware
    start = "" if section.start is None else build.inputs.starts[section.start]
    spec = FitSpec(config, plain(part(section.train, KINDS[one.kind].options)), start)
    peak = 0.0 if section.accelerator is None else hardware[section.accelerator].tflops
    how = dataclasses.replace(part(section, FitHow), peak_tflops=peak)
    return Fit(one.stage, one.kind, spec, how, one.needs, one.path)


def bundle(build: Build) -> Iterable[Stage]:
    """The release."""
    chosen = build.recipe.sampling
    sampling: dict[str, Any] = {"decoder": chosen.decoder.document()}
    if chosen.prior is not None:
        sampling["prior"] = chosen.prior.document()
    sampling["upsamplers"] = {str(side): settings.document() for side, settings in chosen.upsamplers.items()}
    spec = BundleSpec(build.recipe.release.name, sampling)
    parts = tuple(one.stage for one in build.fits if MODELS[one.kind].part)
    yield Bundle(spec, parts, build.measured)


def evaluate(build: Build) -> Iterable[Stage]:
    """Its scores."""
    section = build.recipe.evaluate
    with error_context("evaluate.prompts"):
        prompts = read_prompts(build.inputs.prompts)
    yield EvaluateSample(part(section, EvaluateSpec), part(section, PoolHow), prompts)
    added = [name for name in scores.METRICS if name not in scores.BUILT_IN]
    yield Evaluate({"metrics": added} if added else {})


def promote(build: Build) -> Iterable[Stage]:
    """The verdict, the promotion, and the page about it."""
    yield Gate(build.recipe.gate, build.inputs.head)
    yield Promote(build.recipe.release.name, build.inputs.head)
    yield Report()


STAGES: list[Callable[[Build], Iterable[Stage]]] = [
    source,
    download,
    filtering,
    clip,
    embed,
    curating,
    statistics,
    fits,
    bundle,
    evaluate,
    promote,
]
"""What a run consists of."""


def stages(recipe: Recipe, inputs: Inputs) -> list[Stage]:
    """All stages of the recipe, in the order of `STAGES`."""
    build = Build(recipe, inputs, models(recipe))
    return [stage for make in STAGES for stage in make(build)]
