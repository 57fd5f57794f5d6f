"""Our CLIP (open_clip's configuration and names) ↔ transformers' CLIP models, tokeniser and image processor."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unclip.clip import FIXED, Clip, Preprocess, TextTower, Tokenizer, foreign_settings
from unclip.config import DEPTH, WIDTH
from unclip.errors import Refused
from unclip.files import read_text
from unclip.interop.layout import CLIP_TEXT, CLIP_VISION
from unclip.meta import weightless

Document = dict[str, Any]
START, END = "<|startoftext|>", "<|endoftext|>"
RESAMPLE = {"bilinear": 2, "bicubic": 3}
"""Pillow's numbers, which image processors store."""
ACTIVATIONS = {"quick_gelu": True, "gelu": False}
"""transformers' hidden_act → open_clip's quick_gelu."""
SIZES = dict.fromkeys(
    ("hidden_size", "intermediate_size", "projection_dim", "num_attention_heads", "max_position_embeddings",
     "vocab_size", "eos_token_id", "image_size", "patch_size"), WIDTH,
) | {"num_hidden_layers": DEPTH}  # fmt: skip
"""What config.json says in whole numbers, and their ranges."""
LOGIT_SCALE = math.log(100)
"""Where CLIP's training ends (Radford et al. 2021, section 2.5); transformers' two halves of CLIP do not carry it."""
_VISION = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "timm_model_pretrained"}
_OWN = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale"}


def unsupported(clip: Clip) -> list[str]:
    """Why transformers' CLIP models cannot hold this one; empty where they can."""
    model, text, vision = clip.config, clip.config["text_cfg"], clip.config["vision_cfg"]
    why = []
    if clip.text_width != clip.embedding_width:
        why.append(
            f"its CLIP's token states have width {clip.text_width} and its embeddings {clip.embedding_width}: "
            "diffusers' prior has one width for both"
        )
    if foreign := foreign_settings(model):
        why.append(f"its CLIP's text tower has settings of its own: {', '.join(foreign)}")
    if text.get("no_causal_mask") or text.get("proj_bias") or model.get("custom_text"):
        why.append("its CLIP's text tower is not CLIP's own: no causal mask, a projection with bias, or a custom tower")
    if not isinstance(vision.get("layers", 12), int) or vision.get("timm_model_name"):
        why.append("its CLIP sees with a ResNet or a timm model, and CLIPVisionModelWithProjection is a ViT")
    elif changed := sorted(key for key in set(vision) - _VISION if vision[key] not in (None, False)):
        why.append(f"its CLIP's image tower has settings of its own: {', '.join(changed)}")
    if more := sorted(key for key in set(model) - _OWN if model[key] not in (None, False)):
        why.append(f"its CLIP has settings of its own: {', '.join(more)}")
    return why


def text_state(clip: Clip) -> dict[str, Tensor]:
    """CLIPTextModelWithProjection's tensors."""
    names = TextTower(clip.config).state_dict()
    return CLIP_TEXT.theirs({name: clip.state[name].float() for name in names})


def text_document(clip: Clip) -> Document:
    """CLIPTextModelWithProjection's config.json."""
    text, vocabulary = clip.config["text_cfg"], clip.tokenizer.end + 1
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "hidden_act": _activation(clip),
        "hidden_size": clip.text_width,
        "intermediate_size": int(clip.text_width * text.get("mlp_ratio", 4.0)),
        "projection_dim": clip.embedding_width,
        "num_hidden_layers": text.get("layers", 12),
        "num_attention_heads": text.get("heads", 8),
        "max_position_embeddings": clip.context_length,
        "vocab_size": vocabulary,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
        "layer_norm_eps": 1e-5,
    }


def vision_state(clip: Clip) -> dict[str, Tensor]:
    """CLIPVisionModelWithProjection's tensors."""
    return CLIP_VISION.theirs({name: tensor.float() for name, tensor in clip.state.items() if "visual." in name})


def vision_document(clip: Clip) -> Document:
    """CLIPVisionModelWithProjection's config.json."""
    vision = clip.config["vision_cfg"]
    width = vision.get("width", 768)
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_act": _activation(clip),
        "hidden_size": width,
        "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
        "projection_dim": clip.embedding_width,
        "num_hidden_layers": vision.get("layers", 12),
        "num_attention_heads": width // vision.get("head_width", 64),
        "image_size": clip.image_size,
        "patch_size": vision.get("patch_size", 16),
        "layer_norm_eps": 1e-5,
    }


def processor_document(preprocess: Preprocess) -> Document:
    """CLIPImageProcessor's preprocessor_config.json."""
    side = {"height": preprocess.size, "width": preprocess.size}
    shortest = preprocess.resize == "shortest"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocess.size} if shortest else side,
        "resample": RESAMPLE[preprocess.interpolation],
        "do_center_crop": shortest,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """CLIPTokenizer's folder: vocab.json, merges.txt, tokenizer_config.json.

    It pads with the end token (ours with 0): padding is masked, and the text tower is causal, so nothing sees which.
    """
    folder.mkdir(parents=True)
    ids = {piece: number for piece, number in tokenizer.ids.items() if number < tokenizer.start}
    ids |= {START: tokenizer.start, END: tokenizer.end}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    merges = "".join(f"{merge}\n" for merge in ("#version: 0.2", *tokenizer.merges))
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    document = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.context, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(document, indent=1), encoding="utf-8")


def read_merges(folder: Path, read: Any, text: Document) -> list[str]:
    """The merges of a CLIPTokenizer's folder, checked to number the pieces as ours does.

    read: path → JSON document. text: the text encoder's config.json. Raises Refused for a tokeniser that is not CLIP's.
    """
    if (folder / "tokenizer.json").is_file():
        model = read(folder / "tokenizer.json").get("model", {})
        vocabulary, pairs = model.get("vocab", {}), model.get("merges", [])
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    else:
        vocabulary = read(folder / "vocab.json")
        try:
            lines = read_text(folder / "merges.txt").splitlines()
        except (OSError, ValueError) as error:
            raise Refused(f"the tokeniser's merges cannot be read: {error}") from None
        merges = [line for line in lines if line and not line.startswith("#version")]
    context, size = text.get("max_position_embeddings", 77), text.get("vocab_size", 49_408)
    length = read(folder / "tokenizer_config.json").get("model_max_length")
    if length != context:
        raise Refused(f"the tokeniser's model_max_length is {length}, and the text encoder has {context} positions")
    merges = merges[: size - FIXED]
    ours = Tokenizer(context, size, merges)
    expected = {piece: number for piece, number in ours.ids.items() if number < ours.start}
    expected |= {START: ours.start, END: ours.end}
    if vocabulary != expected:
        raise Refused(
            f"{folder} numbers its pieces otherwise than CLIP's tokeniser: bytes, bytes at a word's end, merges, start "
            "and end"
        )
    return merges


def read_clip(
    text: Document,
    text_tensors: dict[str, Tensor],
    merges: list[str],
    vision: Document | None,
    vision_tensors: dict[str, Tensor] | None,
    processor: Document | None,
) -> Clip:
    """A CLIP of transformers' two halves; without an image half it reads texts only.

    Raises Refused for models that are not CLIP's own.
    """
    width, heads = text.get("hidden_size", 512), text.get("num_attention_heads", 8)
    size, embedding = text.get("vocab_size", 49_408), text.get("projection_dim", 512)
    for document, what in ((text, "text_encoder"), (vision or text, "image_encoder")):
        if document.get("hidden_act", "quick_gelu") not in ACTIVATIONS or document.get("layer_norm_eps", 1e-5) != 1e-5:
            raise Refused(f"{what}/config.json has an activation or a layer_norm_eps that is not CLIP's")
        for key in sorted(SIZES.keys() & document.keys()):
            if type(document[key]) is not int or SIZES[key].refuses(document[key]):
                raise Refused(
                    f"{what}/config.json has {key} = {document[key]!r}; it must be a whole number from 1 to "
                    f"{SIZES[key].most:,}"
                )
        if document.get("hidden_size", 512) % (document.get("num_attention_heads") or 1):
            raise Refused(f"{what}/config.json has a hidden_size that its num_attention_heads do not divide")
    # 2 is what old configurations say whatever the vocabulary; transformers then pools at the largest id, as CLIP does.
    if (end := text.get("eos_token_id", 49_407)) not in (2, size - 1):
        raise Refused(f"text_encoder/config.json pools at token {end}, and CLIP at its vocabulary's last, {size - 1}")
    model: Document = {
        "embed_dim": embedding,
        "quick_gelu": ACTIVATIONS[text.get("hidden_act", "quick_gelu")],
        "vision_cfg": {},
        "text_cfg": {
            "context_length": text.get("max_position_embeddings", 77),
            "vocab_size": size,
            "width": width,
            "heads": heads,
            "layers": text.get("num_hidden_layers", 12),
            "mlp_ratio": text.get("intermediate_size", 2048) / width,
        },
    }
    shapes = {name: tensor.shape for name, tensor in _on_meta(TextTower, model).state_dict().items()}
    state = CLIP_TEXT.ours(shapes, text_tensors, "text_encoder")
    preprocess = None
    if vision is not None and vision_tensors is not None:
        if vision.get("projection_dim", 512) != embedding:
            raise Refused(
                f"image_encoder gives embeddings of width {vision.get('projection_dim', 512)}, text_encoder {embedding}"
            )
        if ACTIVATIONS[vision.get("hidden_act", "quick_gelu")] != model["quick_gelu"]:
            raise Refused("image_encoder and text_encoder have different activations; open_clip's CLIP has one")
        model["vision_cfg"] = _vision_cfg(vision)
        state |= CLIP_VISION.ours(_vision_shapes(model), vision_tensors, "image_encoder")
        state["logit_scale"] = torch.tensor(LOGIT_SCALE)
        preprocess = _preprocess(processor or {}, vision.get("image_size", 224))
    return Clip(model, state, preprocess, merges)


def _vision_cfg(vision: Document) -> Document:
    width = vision.get("hidden_size", 768)
    return {
        "image_size": vision.get("image_size", 224),
        "layers": vision.get("num_hidden_layers", 12),
        "width": width,
        "head_width": width // vision.get("num_attention_heads", 12),
        "patch_size": vision.get("patch_size", 32),
        "mlp_ratio": vision.get("intermediate_size", 3072) / width,
    }


def _vision_shapes(model: Document) -> dict[str, torch.Size]:
    """Shapes of open_clip's ViT, without its import, which takes seconds."""
    vision = model["vision_cfg"]
    width, patch = vision["width"], vision["patch_size"]
    up = int(width * vision["mlp_ratio"])
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": ((vision["image_size"] // patch) ** 2 + 1, width),
        "visual.proj": (width, model["embed_dim"]),
        "visual.conv1.weight": (width, 3, patch, patch),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{norm}.weight": (width,), f"visual.{norm}.bias": (width,)}
    for layer in range(vision["layers"]):
        block = f"visual.transformer.resblocks.{layer}."
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
        for name, out, into in (
            ("attn.in_proj_", 3 * width, width),
            ("attn.out_proj.", width, width),
            ("mlp.c_fc.", up, width),
            ("mlp.c_proj.", width, up),
        ):
            shapes |= {f"{block}{name}weight": (out, into), f"{block}{name}bias": (out,)}
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def _preprocess(processor: Document, side: int) -> Preprocess:
    crop, size = processor.get("do_center_crop", True), processor.get("size", side)
    shortest = size.get("shortest_edge") if isinstance(size, dict) else size
    names = {number: name for name, number in RESAMPLE.items()}
    resample = processor.get("resample", 3)
    fits = shortest == side if crop else size == {"height": side, "width": side}
    if not fits or resample not in names or not processor.get("do_normalize", True):
        raise Refused(
            f"feature_extractor (size {size}, resample {resample}) does not make pictures of {side} px as CLIP's do"
        )
    usual = Preprocess(side)
    return Preprocess(
        side,
        tuple(processor.get("image_mean", usual.mean)),
        tuple(processor.get("image_std", usual.std)),
        names[resample],
        "shortest" if crop else "squash",
    )


def _on_meta(build: Any, model: Document) -> nn.Module:
    with weightless():
        return build(model)


def _activation(clip: Clip) -> str:
    return "quick_gelu" if clip.config.get("quick_gelu", False) else "gelu"
