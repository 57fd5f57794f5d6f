"""The models of a recipe: their configurations, of which a number is written once and derived elsewhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import Refused
from pipelines.recipe.kinds import KINDS
from pipelines.recipe.partial import said
from pipelines.recipe.schema import Recipe, Sampler
from pipelines.stage import error_context
from training.options import named
from unclip.diffusion import check_sampling
from unclip.models import ClassifierConfig, NoisedClipConfig
from unclip.presets import Preset, preset


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
    name = "" if recipe.clip.pretrained is None else recipe.clip.pretrained.name
    config = recipe.clip.model or open_clip_config(name)
    text = config.get("text_cfg", {})
    if "embed_dim" not in config or "width" not in text:
        raise Refused(
            f"clip.pretrained.name: open_clip's {name} has a text tower of another kind; take a "
            "CLIP with CLIP's own, such as ViT-L-14"
        )
    from unclip.clip import clip_widths

    return clip_widths(config)


def open_clip_config(name: str) -> dict[str, Any]:
    """The model configuration of that name, open_clip's or a folder's, read without importing open_clip (7 s)."""
    from unclip.clip import files_of, model_config

    with error_context("clip.pretrained.name"):
        files = files_of(name)
        if files is not None:
            return model_config(files[0])
    spec = importlib.util.find_spec("open_clip")
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else Path()
    path = folder / "model_configs" / f"{name}.json"
    if not path.is_file():
        raise Refused(f"clip.pretrained.name {name!r} is no model of open_clip; see open_clip.list_models()")
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Known:
    """What the models of a recipe are derived from."""

    recipe: Recipe
    preset: Preset
    sides: list[int]
    """Of the cascade in pixels, from the decoder's up."""
    clip: dict[str, Any]
    """embedding, text_width and context of its CLIP."""
    vocabulary: int
    """Of CLIP's tokens."""


def models(recipe: Recipe) -> dict[str, Any]:
    """Stage name → model configuration, with all that is derived filled in."""
    with error_context("models"):
        row = preset(recipe.models)
    sides = sizes(recipe)
    clip: dict[str, Any] = dict(clip_widths(recipe))
    vocabulary = clip.pop("vocabulary")
    if len(row.upsamplers) < len(recipe.upsamplers):
        raise Refused(
            f"upsamplers names {len(recipe.upsamplers)}, and the preset {recipe.models!r} of `models` has "
            f"{len(row.upsamplers)}; leave some out, or choose another preset"
        )
    known = Known(recipe, row, sides, clip, vocabulary)
    made: dict[str, Any] = {}
    for kind in KINDS.values():
        if kind.model and recipe.section(kind.section) is not None:
            made |= named(kind.model)(known, made)
    _check_sampling(recipe.sampling, made)
    return made


def decoder(known: Known, made: dict[str, Any]) -> dict[str, Any]:
    """The decoder's configuration, by its stage's name, as all below."""
    row = known.preset.decoder
    with error_context("decoder.model"):
        changes = {"text": row.text, **said(known.recipe.decoder.model)}
        changes["vocabulary"] = known.vocabulary if changes["text"] == "own" else 0
        return {"decoder": dataclasses.replace(row, size=known.sides[0], **known.clip, **changes)}


def inpainter(known: Known, made: dict[str, Any]) -> dict[str, Any]:
    """The inpainter's: it is the decoder with channels for what is known."""
    return {"inpainter": dataclasses.replace(made["decoder"], inpaint=True)}


def prior(known: Known, made: dict[str, Any]) -> dict[str, Any]:
    """The diffusion prior's."""
    return _prior(known, "prior", "diffusion", "choose another preset")


def ar_prior(known: Known, made: dict[str, Any]) -> dict[str, Any]:
    """The autoregressive prior's, in its place."""
    return _prior(known, "ar_prior", "autoregressive", "give `prior` in its place")


def _prior(known: Known, kind: str, named: str, other: str) -> dict[str, Any]:
    row = getattr(known.preset, kind)
    if row is None:
        raise Refused(f"{kind}: the preset {known.recipe.models!r} of `models` has no {named} prior; {other}")
    with error_context(f"{kind}.model"):
        return {"prior": dataclasses.replace(row, **known.clip, **said(known.recipe.section(kind).model))}


def upsamplers(known: Known, made: dict[str, Any]) -> dict[str, Any]:
    """Each upsampler's."""
    out = {}
    for template, low, size in zip(known.preset.upsamplers, known.sides, known.sides[1:], strict=False):
        section = known.recipe.upsamplers[size]
        with error_context(f"upsamplers.{size}.model"):
            config = dataclasses.replace(template, low=low, size=size, **said(section.model))
        with error_context(f"upsamplers.{size}"):
            config.check_crop(section.train.crop)
        out[f"upsampler-{size}"] = config
    return out


def classifier(known: Known, made: dict[str, Any]) -> dict[str, Any]:
    """The classifier's."""
    assert known.recipe.classifier is not None
    return _guide(known, made, "classifier", ClassifierConfig, {"labels": known.recipe.classifier.labels})


def noised_clip(known: Known, made: dict[str, Any]) -> dict[str, Any]:
    """The noised CLIP's."""
    return _guide(known, made, "noised-clip", NoisedClipConfig, {"embedding": made["decoder"].embedding})


def _guide(known: Known, made: dict[str, Any], stage: str, config: type, more: dict[str, Any]) -> dict[str, Any]:
    """A model that sees the decoder's noised pictures."""
    path, row = stage.replace("-", "_"), known.preset.encoder
    if row is None:
        raise Refused(
            f"{path}: the preset {known.recipe.models!r} of `models` has no encoder of noised pictures; choose another"
        )
    process = {name: getattr(made["decoder"], name) for name in ("size", "schedule", "timesteps")}
    with error_context(f"{path}.model"):
        return {stage: config(**{**vars(row), **process, **said(known.recipe.section(path).model), **more})}


def _check_sampling(sampling: Sampler, models: dict[str, Any]) -> None:
    """Raises Refused for settings that a model has no use for: at the start of a run, not after its training."""
    settings = {"decoder": sampling.decoder} | ({} if sampling.prior is None else {"prior": sampling.prior})
    paths = {name: name for name in settings}
    for size, one in sampling.upsamplers.items():
        settings[f"upsampler-{size}"], paths[f"upsampler-{size}"] = one, f"upsamplers.{size}"
    for name, one in settings.items():
        timesteps = getattr(models[name], "timesteps", None)  # an autoregressive prior has none
        with error_context(f"sampling.{paths[name]}"):
            # γ is measured on the way where the prior needs it, and of no other model.
            check_sampling(name, one, written=timesteps is None, gamma=name == "prior")
            if timesteps is not None and one.steps > timesteps:
                raise Refused(f"steps is {one.steps}, and the model has {timesteps} timesteps; take at most as many")
            if timesteps is not None and one.gamma and len(one.gamma) != timesteps:
                raise Refused(f"gamma has {len(one.gamma)} numbers, and the model {timesteps} timesteps; give one each")
