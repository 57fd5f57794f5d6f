"""From a recipe to its stages: what the workflow of unclip consists of, in one place."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.errors import Refused
from infra.ledger import Entry
from pipelines.download.gather import Gather, GatherHow, check_unused
from pipelines.download.images import PictureSpec
from pipelines.download.stage import Download, DownloadHow, DownloadSpec
from pipelines.embed.stage import Embed, EmbedHow, EmbedSpec
from pipelines.embed.statistics import Statistics
from pipelines.evaluate.prompts import read_prompts
from pipelines.evaluate.stage import Evaluate, EvaluateSample, EvaluateSpec
from pipelines.fit.estimate import Accelerator
from pipelines.fit.gamma import Gamma, wants_gamma
from pipelines.fit.stage import Fit, FitSpec, LoadClip, LoadHow, LoadSpec
from pipelines.recipe.errors import blaming
from pipelines.recipe.schema import Recipe, Sampler
from pipelines.recipe.sections import part, said
from pipelines.recipe.start import TakeClip, TakeSpec
from pipelines.release.bundle import Bundle, BundleSpec, Gate, Promote
from pipelines.reports.count import Count
from pipelines.reports.data import DataReport
from pipelines.reports.release import Report
from pipelines.select.rules import Rule, opened
from pipelines.select.stage import Look, Select
from pipelines.source.stage import Source, SourceHow, SourceSpec
from pipelines.stage import PoolHow, Stage, plain
from training.job import FitHow
from training.options import CONFIGS
from unclip.diffusion.settings import check_sampling


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


def sizes(recipe: Recipe) -> list[int]:
    """Sides of the cascade in pixels, from the decoder's up; raises Refused unless they grow."""
    chain = [recipe.embed.base, *sorted(recipe.upsamplers)]
    if any(b % a or a >= b for a, b in itertools.pairwise(chain)):
        raise Refused(
            f"embed.base and upsamplers make {' → '.join(map(str, chain))} px; each must be a multiple of the last"
        )
    return chain


def clip_widths(recipe: Recipe) -> dict[str, int]:
    """embedding, text_width, context and vocabulary of the recipe's CLIP, from its configuration alone."""
    config = recipe.clip.model or open_clip_config(recipe.clip.pretrained.name)
    text = config.get("text_cfg", {})
    if "embed_dim" not in config or "width" not in text:
        raise Refused(
            f"clip.pretrained.name: open_clip's {recipe.clip.pretrained.name} has a text tower of another kind; take a "
            "CLIP with CLIP's own, such as ViT-L-14"
        )
    from unclip.clip.model import clip_widths

    return clip_widths(config)


def open_clip_config(name: str) -> dict[str, Any]:
    """The model configuration of that name, open_clip's or a folder's, read without importing open_clip (7 s)."""
    from unclip.clip.open_clip_folder import files_of, model_config

    with blaming("clip.pretrained.name"):
        files = files_of(name)
        if files is not None:
            return model_config(files[0])
    spec = importlib.util.find_spec("open_clip")
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else Path()
    path = folder / "model_configs" / f"{name}.json"
    if not path.is_file():
        raise Refused(f"clip.pretrained.name {name!r} is no model of open_clip; see open_clip.list_models()")
    return json.loads(path.read_text())


def models(recipe: Recipe) -> dict[str, Any]:
    """Stage name → model configuration, with all that is derived filled in."""
    from unclip.presets import preset

    with blaming("models"):
        row = preset(recipe.models)
    chain = sizes(recipe)
    clip: dict[str, Any] = dict(clip_widths(recipe))
    vocabulary = clip.pop("vocabulary")
    if len(row.upsamplers) < len(recipe.upsamplers):
        raise Refused(
            f"upsamplers names {len(recipe.upsamplers)}, and the preset {recipe.models!r} of `models` has "
            f"{len(row.upsamplers)}; leave some out, or choose another preset"
        )
    out: dict[str, Any] = {}
    with blaming("decoder.model"):
        told = {"text": row.decoder.text, **said(recipe.decoder.model)}
        told["vocabulary"] = vocabulary if told["text"] == "own" else 0
        out["decoder"] = dataclasses.replace(row.decoder, size=chain[0], **clip, **told)
    if recipe.inpainter is not None:
        out["inpainter"] = dataclasses.replace(out["decoder"], inpaint=True)
    for kind, section in _priors(recipe):
        prior = getattr(row, kind)
        if prior is None:
            other = "give `prior` in its place" if kind == "ar_prior" else "choose another preset"
            named = "autoregressive" if kind == "ar_prior" else "diffusion"
            raise Refused(f"{kind}: the preset {recipe.models!r} of `models` has no {named} prior; {other}")
        with blaming(f"{kind}.model"):
            out["prior"] = dataclasses.replace(prior, **clip, **said(section.model))
    for template, low, size in zip(row.upsamplers, chain, chain[1:], strict=False):
        changes = said(recipe.upsamplers[size].model)
        with blaming(f"upsamplers.{size}.model"):
            made = dataclasses.replace(template, low=low, size=size, **changes)
        with blaming(f"upsamplers.{size}"):
            made.check_crop(recipe.upsamplers[size].train.crop)
        out[f"upsampler-{size}"] = made
    _check_sampling(recipe.sampling, out)
    return out | _guides(recipe, row.encoder, out["decoder"])


def _guides(recipe: Recipe, row: Any, decoder: Any) -> dict[str, Any]:
    """Stage name → configuration of the classifier and the noised CLIP that the recipe asks for."""
    from unclip.models.classifier import ClassifierConfig
    from unclip.models.noised_clip import NoisedClipConfig

    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {}
    if recipe.classifier is not None:
        kinds["classifier"] = ClassifierConfig, recipe.classifier, {"labels": recipe.classifier.labels}
    if recipe.noised_clip is not None:
        kinds["noised-clip"] = NoisedClipConfig, recipe.noised_clip, {"embedding": decoder.embedding}
    if kinds and row is None:
        raise Refused(
            f"{next(iter(kinds)).replace('-', '_')}: the preset {recipe.models!r} of `models` has no encoder of noised "
            "pictures; choose another"
        )
    process = {name: getattr(decoder, name) for name in ("size", "schedule", "timesteps")}
    out = {}
    for name, (config, section, more) in kinds.items():
        with blaming(f"{name.replace('-', '_')}.model"):
            out[name] = config(**{**vars(row), **process, **said(section.model), **more})
    return out


def _check_sampling(sampling: Sampler, models: dict[str, Any]) -> None:
    """Raises Refused for settings that a model has no use for: at the start of a run, not after its training."""
    settings = {"decoder": sampling.decoder} | ({} if sampling.prior is None else {"prior": sampling.prior})
    paths = {name: name for name in settings}
    for size, one in sampling.upsamplers.items():
        settings[f"upsampler-{size}"], paths[f"upsampler-{size}"] = one, f"upsamplers.{size}"
    for name, one in settings.items():
        timesteps = getattr(models[name], "timesteps", None)  # an autoregressive prior has none
        with blaming(f"sampling.{paths[name]}"):
            # γ is measured on the way where the prior needs it, and of no other model.
            check_sampling(name, one, written=timesteps is None, gamma=name == "prior")
            if timesteps is not None and one.steps > timesteps:
                raise Refused(f"steps is {one.steps}, and the model has {timesteps} timesteps; take at most as many")
            if timesteps is not None and one.gamma and len(one.gamma) != timesteps:
                raise Refused(f"gamma has {len(one.gamma)} numbers, and the model {timesteps} timesteps; give one each")


def _priors(recipe: Recipe) -> list[tuple[str, Any]]:
    """(kind, section) of the prior that the recipe asks for; none where the decoder draws from prompts alone."""
    given = [("prior", recipe.prior), ("ar_prior", recipe.ar_prior)]
    return [(kind, section) for kind, section in given if section is not None]


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
