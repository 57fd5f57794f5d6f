"""The models of a recipe: their configurations, of which a number is written once and derived elsewhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

from infra.errors import Refused
from pipelines.recipe.schema import Recipe, Sampler
from pipelines.recipe.sections import said
from pipelines.stage import blaming
from unclip.diffusion import check_sampling


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
    from unclip.clip import clip_widths

    return clip_widths(config)


def open_clip_config(name: str) -> dict[str, Any]:
    """The model configuration of that name, open_clip's or a folder's, read without importing open_clip (7 s)."""
    from unclip.clip import files_of, model_config

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
    from unclip.models import ClassifierConfig, NoisedClipConfig

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
