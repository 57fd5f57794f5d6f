"""From a recipe to its stages: what the workflow of unclip consists of, in one place."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from infra.ledger import Entry
from pipelines.download import Download, DownloadHow, DownloadSpec, Gather, GatherHow, PictureSpec, check_unused
from pipelines.embed import Embed, EmbedHow, EmbedSpec, Statistics
from pipelines.evaluate import Evaluate, EvaluateSample, EvaluateSpec, read_prompts
from pipelines.fit import Accelerator, Fit, FitSpec, Gamma, LoadClip, LoadHow, LoadSpec, TakeClip, TakeSpec, wants_gamma
from pipelines.promote import Gate, Promote
from pipelines.recipe.models import _priors, models
from pipelines.recipe.schema import Recipe
from pipelines.recipe.sections import part
from pipelines.release import Bundle, BundleSpec
from pipelines.reports import Count, DataReport, Report
from pipelines.select import Look, Select
from pipelines.select.rules import Rule, opened
from pipelines.source import Source, SourceHow, SourceSpec
from pipelines.stage import PoolHow, Stage, blaming, plain
from training.job import FitHow
from training.options import CONFIGS


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


def _opened(group: str, rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules of filter or curate with what they read."""
    out = []
    for number, rule in enumerate(rules):
        with blaming(f"{group}.rules.{number}"):
            out.append(opened(rule))
    return tuple(out)


def _fit(
    name: str,
    model: str,
    section: Any,
    config: dict[str, Any],
    needs: tuple[str, ...],
    starts: Mapping[str, str],
    hardware: Mapping[str, Accelerator],
) -> Fit:
    start = "" if section.start is None else starts[section.start]
    spec = FitSpec(config, plain(part(section.train, CONFIGS[model])), start)
    peak = 0.0 if section.accelerator is None else hardware[section.accelerator].tflops
    return Fit(name, model, spec, dataclasses.replace(part(section, FitHow), peak_tflops=peak), needs)


def stages(recipe: Recipe, inputs: Inputs) -> list[Stage]:
    """All stages of the recipe, in the order in which a person thinks of them."""
    made = models(recipe)
    fit = functools.partial(_fit, starts=inputs.starts, hardware=recipe.hardware)
    if recipe.clip.pretrained:
        loaded = recipe.clip.pretrained
        clip: Any = LoadClip.of(part(loaded, LoadSpec), part(loaded, LoadHow))
    elif recipe.clip.train is None:
        clip = TakeClip(TakeSpec(inputs.starts[recipe.clip.start], recipe.clip.model))
    else:
        clip = fit("clip", "clip", recipe.clip, recipe.clip.model, ("download", "filter"))
    rows = ("embed", "curate", "statistics", "clip")
    fits: list[Any] = [
        fit("decoder", "decoder", recipe.decoder, plain(made["decoder"]), rows),
        *(fit("prior", kind, section, plain(made["prior"]), rows) for kind, section in _priors(recipe)),
        *(
            fit(f"upsampler-{size}", "upsampler", recipe.upsamplers[size], plain(made[f"upsampler-{size}"]), rows)
            for size in sorted(recipe.upsamplers)
        ),
    ]
    if recipe.inpainter is not None:
        # From the run's own decoder, unless a release is named.
        from_decoder = rows if recipe.inpainter.start else (*rows, "decoder")
        fits.append(
            fit("inpainter", "inpainter", recipe.inpainter, plain(made["inpainter"]), from_decoder),
        )
    if recipe.classifier is not None:
        guide = plain(made["classifier"])
        fits.append(fit("classifier", "classifier", recipe.classifier, guide, ("embed", "curate")))
    if recipe.noised_clip is not None:
        guide = plain(made["noised-clip"])
        fits.append(fit("noised-clip", "noised_clip", recipe.noised_clip, guide, ("embed", "curate", "clip")))
    chosen = recipe.sampling
    sampling: dict[str, Any] = {"decoder": chosen.decoder.document()}
    if chosen.prior is not None:
        sampling["prior"] = chosen.prior.document()
    sampling["upsamplers"] = {str(side): settings.document() for side, settings in chosen.upsamplers.items()}
    asked = recipe.prior is not None and chosen.prior is not None and wants_gamma(chosen.prior)
    measured = [Gamma.beside(recipe.prior)] if asked else []
    bundle = Bundle(BundleSpec(recipe.release.name, sampling), tuple(one.name for one in fits), bool(measured))
    where = SourceHow(inputs.urls, recipe.source.tars, recipe.source.folder)
    if where.tars or where.folder:
        check_unused(recipe.download, "source.tars" if where.tars else "source.folder")
        samples = "" if inputs.unread else where.samples or ""
        how = GatherHow(samples, recipe.download.threads, recipe.download.cpus, recipe.download.apart)
        pictures: Any = Gather(part(recipe.download, PictureSpec), how)
    else:
        pictures = Download.of(part(recipe.download, DownloadSpec), part(recipe.download, DownloadHow))
    filtering, curating = _opened("filter", recipe.filter.rules), _opened("curate", recipe.curate.rules)
    kept = recipe.columns.keep
    with blaming("evaluate.prompts"):
        prompts = read_prompts(inputs.prompts)
    return [
        Source(SourceSpec(recipe.columns, recipe.source.rows_per_shard), where, inputs.list_digests, inputs.unread),
        pictures,
        Look("filter", filtering, kept),
        Select("filter", filtering, kept),
        clip,
        Embed(part(recipe.embed, EmbedSpec), part(recipe.embed, EmbedHow)),
        Look("curate", curating, kept),
        Select("curate", curating, kept),
        Count(),
        DataReport({"filter": plain(filtering), "curate": plain(curating)}),
        Statistics(),
        *fits,
        *measured,
        bundle,
        EvaluateSample(part(recipe.evaluate, EvaluateSpec), part(recipe.evaluate, PoolHow), prompts),
        Evaluate(),
        Gate(recipe.gate, inputs.head),
        Promote(recipe.release.name, inputs.head),
        Report(),
    ]
