"""diffusers: our releases as folders that its unCLIP pipelines load, and such folders (Karlo's layout) as releases.

    export_diffusers("release/", "folder/")          # UnCLIPPipeline.from_pretrained("folder/")
    import_diffusers("karlo-v1-alpha/", "release/")  # UnCLIP.load("release/")

Both sides then draw the same picture from the same noise. Nothing of diffusers or transformers is imported. What to
know when comparing:
- A pipeline's steps and guidance scales are arguments of its call, and it samples as our `ddpm` does; what a release
  says about sampling has no place in the folder. An import writes down Karlo's (25, 25 and 7 steps, scales 4 and 8).
- diffusers keeps its noise levels in float32, where the last step of 1000 multiplies the picture by 0.99947, not by 1.
- Its prior knows no candidates, and its pipeline no second upsampler.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unclip.cascade import UnCLIP
from unclip.clip import Clip
from unclip.diffusion import Sampling
from unclip.errors import Refused
from unclip.files import explain_document, read_document, read_tensors
from unclip.interop.clip import (
    processor_document,
    read_clip,
    read_merges,
    text_document,
    text_state,
    unsupported,
    vision_document,
    vision_state,
    write_tokenizer,
)
from unclip.interop.config import (
    PREDICTIONS,
    SCHEDULER,
    Document,
    decoder_document,
    head,
    prior_document,
    read_decoder,
    read_prior,
    read_upsampler,
    scheduler_document,
    text_proj_document,
    upsampler_document,
)
from unclip.interop.layout import PRIOR, TEXT_PROJ, UNET
from unclip.meta import weightless
from unclip.models import IMAGE_TOKENS, Decoder, DiffusionPrior, NullText, Upsampler
from unclip.release import Release, check_fit, save_model, save_release

PIPELINE = "UnCLIPPipeline"
INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model"
CLASSES = {
    "prior": "PriorTransformer",
    "text_proj": "UnCLIPTextProjModel",
    "decoder": "UNet2DConditionModel",
    "super_res_first": "UNet2DModel",
    "super_res_last": "UNet2DModel",
    "prior_scheduler": SCHEDULER,
    "decoder_scheduler": SCHEDULER,
    "super_res_scheduler": SCHEDULER,
    "text_encoder": "CLIPTextModelWithProjection",
    "tokenizer": "CLIPTokenizer",
}
MODELS = ("prior", "text_proj", "decoder", "super_res_first", "super_res_last")
IMAGE_CLASSES = {"image_encoder": "CLIPVisionModelWithProjection", "feature_extractor": "CLIPImageProcessor"}
# diffusers since 0.38 finds this class under no shorter name, so folders that say "unclip" or "diffusers" do not load.
TEXT_PROJ_MODULE = "diffusers.pipelines.deprecated.unclip.text_proj"
NULL_TEXT = ("null_text.embedding", "null_text.states", "null_text.mask")
SAMPLING = {
    "prior": Sampling("ddpm", 25, guidance=4.0),
    "decoder": Sampling("ddpm", 25, guidance=8.0),
    "upsampler": Sampling("ddpm", 7),
}
"""UnCLIPPipeline's defaults, which are Karlo's."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    size: int
    """Side of the pictures that the pipelines will draw."""
    left_out: tuple[str, ...]
    """Tables of γ, upsamplers, inpainter and guides of the release for which a pipeline has no place."""


def export_diffusers(model: UnCLIP | Path | str, folder: Path | str) -> Exported:
    """Writes a release as a folder for diffusers' UnCLIPPipeline and UnCLIPImageVariationPipeline.

    A pipeline holds one upsampler, no inpainter, no guide and no γ: they are left out, and named in the answer. Raises
    Refused, with every reason, for what diffusers cannot hold, and where the folder has something in it already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refused(f"{folder} is not empty; an export makes a folder of its own")
    model = model if isinstance(model, UnCLIP) else UnCLIP.load(model)
    if why := _unheld(model):
        raise Refused("diffusers' UnCLIPPipeline cannot hold this release: " + "; ".join(why))
    prior, decoder, upsampler, clip = model.prior, model.decoder, model.upsamplers[0], model.clip
    assert isinstance(prior, DiffusionPrior)  # any other was refused above
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{folder} cannot be made: {error.strerror}") from None
    _write(folder / "prior", prior_document(prior.config), PRIOR.theirs(_without_null_text(prior)))
    _write(folder / "text_proj", text_proj_document(decoder.config), TEXT_PROJ.theirs(_folded(decoder)))
    _write(folder / "decoder", decoder_document(decoder.config), UNET.theirs(decoder.unet.state_dict()))
    for part, unet in (("super_res_first", upsampler.unet), ("super_res_last", upsampler.last or upsampler.unet)):
        _write(folder / part, upsampler_document(upsampler.config), UNET.theirs(unet.state_dict()))
    _write(folder / "text_encoder", text_document(clip), text_state(clip), "model")
    _write(folder / "image_encoder", vision_document(clip), vision_state(clip), "model")
    write_tokenizer(clip.tokenizer, folder / "tokenizer")
    documents = {
        "prior_scheduler/scheduler_config.json": scheduler_document(
            prior.config, prior.config.clip_range, learned_range=False
        ),
        "decoder_scheduler/scheduler_config.json": scheduler_document(decoder.config, 1.0, learned_range=True),
        "super_res_scheduler/scheduler_config.json": scheduler_document(
            upsampler.config, 1.0, learned_range=upsampler.config.learned_range
        ),
        "feature_extractor/preprocessor_config.json": processor_document(clip.preprocess),
        INDEX: head(PIPELINE) | {part: [_library(part), name] for part, name in (CLASSES | IMAGE_CLASSES).items()},
    }
    for name, document in documents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    inpainter = () if model.inpainter is None else ("inpainter",)
    tables = (f"{name}/gamma" for name in model.gamma)
    return Exported(upsampler.config.size, (*tables, *model.components[3:], *inpainter, *model.guides.models))


def import_diffusers(
    folder: Path | str, out: Path | str, *, name: str = "karlo", images: Path | str | None = None
) -> Release:
    """Writes a folder that UnCLIPPipeline loads as a release; returns what the release says.

    images: a folder with image_encoder and feature_extractor, where the first has none: Karlo's are in its
    image-variations folder. Without, the release draws from texts and sees no pictures. Only JSON, text and
    safetensors are read, never a pickle. Raises Refused for a missing file, another class, an option or a width that is
    none of ours.
    """
    folder, out = Path(folder), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(f"{out} is not empty; an import makes a folder of its own")
    index = _read(folder / INDEX)
    if index.get("_class_name") != PIPELINE:
        raise Refused(
            f"{folder / INDEX} names the pipeline {index.get('_class_name')!r}; a release needs the prior of {PIPELINE}"
        )
    _check_classes(index, CLASSES, folder)
    with explain_document(folder, "folder of diffusers'"):
        clip = _read_clip(folder, Path(images) if images is not None else None)
        models = _read_models(folder, clip)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as parts:
        clip.save(Path(parts) / "clip")
        for part, model in models.items():
            kind = part.split("-")[0]
            fingerprint = None if kind == "upsampler" else clip.fingerprint
            save_model(Path(parts) / part, kind, model.config, model.state_dict(), clip=fingerprint)
        sampling = {part: SAMPLING[part.split("-")[0]] for part in models}
        return save_release(out, name, {part: Path(parts) / part for part in ("clip", *models)}, sampling)


def _unheld(model: UnCLIP) -> list[str]:
    """Why diffusers cannot hold a release; empty where it can."""
    why = unsupported(model.clip)
    if model.prior is None:
        return [*why, "its decoder draws from prompts alone, without a prior, and the pipeline always runs one"]
    if not isinstance(model.prior, DiffusionPrior):
        return [*why, f"its prior is a {type(model.prior).__name__}, and PriorTransformer is a diffusion prior"]
    if not model.upsamplers:
        return [*why, "it has no upsampler, and the pipeline always runs one"]
    decoder, upsampler = model.decoder.config, model.upsamplers[0].config
    for name, config in (("prior", model.prior.config), ("decoder", decoder), ("upsampler", upsampler)):
        if config.schedule != "cosine":
            why.append(f"its {name}'s noise schedule is {config.schedule}, and {SCHEDULER} has the cosine alone")
        if config.prediction not in PREDICTIONS:
            why.append(f"its {name} predicts {config.prediction}, and {SCHEDULER} reads x0 or eps")
        if getattr(config, "unshuffle", 1) != 1:
            why.append(f"its {name} folds squares of {config.unshuffle} px into channels (unshuffle)")  # type: ignore[union-attr]
    if decoder.position:
        why.append("its decoder adds learned maps (position)")
    if decoder.text == "own":
        why.append("its decoder reads the caption through a text transformer of its own (text own), not through CLIP")
    elif decoder.text_depth:
        why.append(f"its decoder has a text transformer of {decoder.text_depth} blocks (text_depth)")
    if not decoder.learned_range:
        why.append("its decoder has three output channels; the pipeline splits six (learned_range)")
    lowest = decoder.size >> (len(decoder.multiples) - 1)
    if lowest not in decoder.attention:
        why.append(f"its decoder does not attend at its lowest level, {lowest} px, and diffusers' middle block does")
    if any(side * side == decoder.context + IMAGE_TOKENS for side in decoder.attention):
        why.append(
            f"an attended level has as many pixels as there are context tokens ({decoder.context} + {IMAGE_TOKENS})"
        )
    if not upsampler.antialias:
        why.append("its upsampler enlarges its input by another cubic than the pipeline does (antialias)")
    if not why:
        empty = model.clip.encode_text([""])
        for name, part in (("prior", model.prior), ("decoder", model.decoder)):
            null = cast(NullText, part.null_text)
            seen = empty.mask[0]
            close = torch.equal(null.mask, seen) and torch.allclose(null.embedding, empty.embedding[0], atol=1e-4)
            if not (close and torch.allclose(null.states[seen], empty.states[0][seen], atol=1e-4)):
                why.append(f"its {name}'s null text is not CLIP's view of the empty text, which the pipeline takes")
    return why


def _without_null_text(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name not in NULL_TEXT}


def _folded(decoder: Decoder) -> dict[str, Tensor]:
    """What is around the decoder's U-Net, made to read raw embeddings: W((z − μ)/σ) + b = (W/σ)z + (b − Wμ/σ)."""
    state = {k: v.double() for k, v in _without_null_text(decoder).items() if not k.startswith("unet.")}
    mean, std = state.pop("mean"), state.pop("std")
    state["null_image"] = state["null_image"] * std + mean
    for name in ("image_time", "image_tokens"):
        weight = state[f"{name}.weight"] / std
        state |= {f"{name}.weight": weight, f"{name}.bias": state[f"{name}.bias"] - weight @ mean}
    return {name: tensor.float() for name, tensor in state.items()}


def _library(part: str) -> str:
    if part == "text_proj":
        return TEXT_PROJ_MODULE
    return "transformers" if part in ("text_encoder", "tokenizer", *IMAGE_CLASSES) else "diffusers"


def _write(folder: Path, document: Document, state: dict[str, Tensor], weights: str = WEIGHTS) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    # transformers refuses a file that does not say for which library it was written.
    save_file(
        {name: state[name].contiguous().clone() for name in sorted(state)},
        folder / f"{weights}.safetensors",
        {"format": "pt"},
    )


def _read_clip(folder: Path, images: Path | None) -> Clip:
    text, merges = _read(folder / "text_encoder/config.json"), folder / "tokenizer"
    vision = vision_tensors = processor = None
    if images is None and (folder / "image_encoder").is_dir():
        images = folder
    if images is not None:
        _check_classes(_read(images / INDEX), IMAGE_CLASSES, images)
        vision, vision_tensors = (
            _read(images / "image_encoder/config.json"),
            _tensors(images / "image_encoder", "model"),
        )
        processor = _read(images / "feature_extractor/preprocessor_config.json")
    tensors = _tensors(folder / "text_encoder", "model")
    return read_clip(text, tensors, read_merges(merges, _read, text), vision, vision_tensors, processor)


def _read_models(folder: Path, clip: Clip) -> dict[str, nn.Module]:
    """prior, decoder and upsampler-<side> of a folder; Refused where their widths are not the CLIP's."""
    documents = {part: _read(folder / part / "config.json") for part in MODELS}
    schedulers = {
        part: _read(folder / f"{part}_scheduler/scheduler_config.json") for part in ("prior", "decoder", "super_res")
    }
    prior_config = read_prior(documents["prior"], schedulers["prior"], "prior")
    decoder_config = read_decoder(
        documents["decoder"], documents["text_proj"], schedulers["decoder"], clip.context_length, "decoder"
    )
    tensors = {part: _tensors(folder / part, WEIGHTS) for part in documents}
    first, last = tensors["super_res_first"], tensors["super_res_last"]
    two = set(first) != set(last) or any(not torch.equal(first[name], last[name]) for name in first)
    upsampler_config = read_upsampler(
        documents["super_res_first"], documents["super_res_last"], schedulers["super_res"], decoder_config.size, two=two
    )
    widths = {"embedding": clip.embedding_width, "text_width": clip.text_width, "context": clip.context_length}
    check_fit(widths, prior_config, decoder_config, [upsampler_config])
    with weightless():
        prior, decoder, upsampler = DiffusionPrior(prior_config), Decoder(decoder_config), Upsampler(upsampler_config)
    null = dict(zip(NULL_TEXT, (part[0] for part in clip.encode_text([""])), strict=True))
    _fill(prior, PRIOR.ours(_shapes(prior), tensors["prior"], "prior") | null)
    around = TEXT_PROJ.ours(_shapes(decoder, ("unet.", "mean", "std")), tensors["text_proj"], "text_proj")
    d = decoder_config.embedding
    inside = _under("unet.", UNET.ours(_shapes(decoder.unet), tensors["decoder"], "decoder"))
    _fill(decoder, around | inside | null | {"mean": torch.zeros(d), "std": torch.ones(d)})
    state = _under("unet.", UNET.ours(_shapes(upsampler.unet), first, "super_res_first"))
    if upsampler.last is not None:
        state |= _under("last.", UNET.ours(_shapes(upsampler.last), last, "super_res_last"))
    _fill(upsampler, state)
    return {"prior": prior, "decoder": decoder, f"upsampler-{upsampler_config.size}": upsampler}


def _fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    model.load_state_dict(state, assign=True)


def _shapes(model: nn.Module, without: tuple[str, ...] = ()) -> dict[str, torch.Size]:
    state = _without_null_text(model)
    return {name: tensor.shape for name, tensor in state.items() if not name.startswith(without)}


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def _check_classes(index: Document, classes: dict[str, str], folder: Path) -> None:
    for part, name in classes.items():
        entry = index.get(part)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found not in (name, f"{name}Fast"):
            raise Refused(f"{folder / INDEX} names {found!r} as its {part}, and a release is made of a {name}")


def _read(path: Path) -> Document:
    try:
        document = read_document(path)
    except FileNotFoundError:
        raise Refused(f"{path} does not exist, so this is no folder of {PIPELINE}, or an incomplete one") from None
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(document, dict):
        raise Refused(f"{path} holds no JSON object")
    return document


def _tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of a component, from one safetensors file or from shards; never from a pickle."""
    path = folder / f"{stem}.safetensors"
    if not path.is_file() and (index := folder / f"{stem}.safetensors.index.json").is_file():
        names = sorted(set(_read(index).get("weight_map", {}).values()))
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise Refused(f"{index} names a file outside its folder")
        tensors = {name: tensor for shard in names for name, tensor in read_tensors(folder / shard).items()}
    elif not path.is_file() and (
        pickled := sorted([*folder.glob("*.bin"), *folder.glob("*.ckpt"), *folder.glob("*.pt")])
    ):
        raise Refused(
            f"{pickled[0]} is a pickle, which may run code when it is read, so it is not read. Take the safetensors of "
            "the same weights, or make them where you trust the file: load the pipeline there and save_pretrained it"
        )
    else:
        tensors = read_tensors(path)
    # Buffers of position numbers, which old versions of transformers saved.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    if bad := sorted(name for name, tensor in tensors.items() if not tensor.is_floating_point()):
        raise Refused(f"{folder} holds {tensors[bad[0]].dtype} in {bad[0]}, and weights are floating-point numbers")
    if bad := sorted(name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())):
        raise Refused(f"{folder} holds numbers that are not finite, in {', '.join(bad[:5])}")
    return tensors
