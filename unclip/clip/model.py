"""CLIP as the rest of unclip sees it: a frozen adapter over an open_clip model, with a fingerprint.

Texts run through our own text transformer, equal to open_clip's, and our own tokeniser, since importing open_clip takes
longer than making a picture; pictures run through open_clip's image tower, built when the first picture comes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.clip.open_clip_folder import files_of, model_config
from unclip.clip.text import Text, TextTower, foreign_settings
from unclip.clip.tokenizer import CLIP_VOCABULARY, Tokenizer
from unclip.clip.vision import foreign_vision_settings, image_tower
from unclip.config import SIDE, Range, mistyped, outside
from unclip.errors import Refused
from unclip.files import (
    CONFIG,
    WEIGHTS,
    explain_document,
    read_json,
    read_tensors,
    read_text,
    shape_mismatch,
    write_json,
    write_tensors,
)
from unclip.meta import weightless

__all__ = ["Clip", "Preprocess", "Text", "build_clip"]

log = logging.getLogger(__name__)

MERGES = "merges.txt"
RESIZES = ("shortest", "squash")
INTERPOLATIONS = ("bicubic", "bilinear")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHANNEL = Range(-1e3, 1e3)
DEVIATION = Range(1e-6, 1e3)
"""Of a channel in [0, 1]; smaller ones would make of every picture the same overflow."""


@dataclass(frozen=True)
class Preprocess:
    """How pixels reach the image tower."""

    size: int
    """Side of the tower's input, in pixels."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Subtracted from channels in [0, 1]; the default is CLIP's."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Divides them afterwards."""
    interpolation: str = "bicubic"
    """bicubic or bilinear, antialiased."""
    resize: str = "shortest"
    """shortest: scale the shortest side to `size` and crop the centre; squash: scale both sides."""

    def __post_init__(self) -> None:
        if wrong := mistyped(Preprocess, vars(self)) or outside(self, size=SIDE, mean=CHANNEL, std=DEVIATION):
            raise Refused(f"CLIP preprocessing: {wrong}")
        if self.resize not in RESIZES:
            raise Refused(f"CLIP preprocessing: resize {self.resize!r} is unknown; use one of {', '.join(RESIZES)}")
        if self.interpolation not in INTERPOLATIONS:
            raise Refused(
                f"CLIP preprocessing: interpolation {self.interpolation!r} is unknown; "
                f"use one of {', '.join(INTERPOLATIONS)}"
            )

    def __call__(self, pictures: Tensor) -> Tensor:
        """uint8 [b, 3, h, w], or floats in [0, 1] → float32 [b, 3, size, size], in torch alone, hence repeatable."""
        x = pictures.float().div_(255) if pictures.dtype == torch.uint8 else pictures.float()
        height, width = x.shape[-2:]
        if (height, width) != (self.size, self.size):
            short = min(height, width)
            sides = [self.size if self.resize == "squash" else self.size * side // short for side in (height, width)]
            x = F.interpolate(x, sides, mode=self.interpolation, antialias=True, align_corners=False).clamp_(0, 1)
            top, left = (round((side - self.size) / 2) for side in sides)
            x = x[..., top : top + self.size, left : left + self.size]
        mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (x - mean).div_(std)


def build_clip(model: dict[str, Any]) -> nn.Module:
    """A new, random open_clip model from open_clip's own configuration (`embed_dim`, `vision_cfg`, `text_cfg`, …).

    This is what CLIP training trains. It imports all of open_clip, which takes seconds of a core: what a finished CLIP
    computes goes through `Clip.images` and `Clip.text`, which do without where they can. Raises Refused for what the
    adapter cannot hold or open_clip does not know, and where it is not installed.
    """
    check_clip(model)
    try:
        import open_clip.model as classes
    except ImportError as error:
        raise Refused(f"open_clip cannot be imported ({error}); install unclip with its dependencies") from None
    settings = dict(model)
    custom = settings.pop("custom_text", False)
    # Weights come from the release; a tower must never fetch its own.
    settings["vision_cfg"] = {**settings["vision_cfg"], "timm_model_pretrained": False}
    try:
        return (classes.CustomTextCLIP if custom else classes.CLIP)(**settings)
    except (TypeError, AssertionError) as error:
        raise Refused(f"open_clip cannot build a CLIP from this configuration: {error}") from None


def check_clip(model: dict[str, Any]) -> None:
    """Raises Refused for a model configuration that the adapter cannot hold."""
    for key, kind in (("embed_dim", int), ("vision_cfg", dict), ("text_cfg", dict)):
        if not isinstance(model.get(key), kind):
            raise Refused(f"a CLIP configuration needs {key!r}, as open_clip's model configurations have it")
    text = model["text_cfg"]
    if "multimodal_cfg" in model or text.get("embed_cls"):
        raise Refused("CoCa models are not supported: their text tower has no padding-free token states. Use a CLIP.")
    if hf := text.get("hf_model_name") or text.get("hf_tokenizer_name"):
        raise Refused(
            f"this CLIP reads text with Hugging Face's {hf!r}, and unclip's releases carry CLIP's own tokeniser only. "
            "Use an open_clip model with CLIP's tokeniser, such as ViT-L-14."
        )
    if text.get("tokenizer_kwargs"):
        raise Refused(f"this CLIP changes its tokeniser ({text['tokenizer_kwargs']}), which unclip does not support")


def clip_widths(model: dict[str, Any]) -> dict[str, int]:
    """What other models must fit: `embedding`, `text_width`, `context` (tokens) and `vocabulary` of an open_clip
    configuration."""
    text = model["text_cfg"]
    return {
        "embedding": model["embed_dim"],
        "text_width": text.get("width", 512),
        "context": text.get("context_length", 77),
        "vocabulary": text.get("vocab_size", CLIP_VOCABULARY),
    }


class Clip:
    """A frozen CLIP: embeddings are raw (not normalised) float32 [b, `embedding_width`], whatever it computes in.

    model: open_clip's configuration. state: open_clip's state dict. Nothing of it is ever trained or changed.
    """

    def __init__(
        self,
        model: dict[str, Any],
        state: dict[str, Tensor],
        preprocess: Preprocess | None = None,
        merges: Sequence[str] | None = None,
    ) -> None:
        check_clip(model)
        text = model["text_cfg"]
        self.config = json.loads(json.dumps(model))
        self.preprocess = preprocess or Preprocess(_side(model))
        self.tokenizer = Tokenizer(text.get("context_length", 77), text.get("vocab_size", CLIP_VOCABULARY), merges)
        self.state = {name: tensor.detach() for name, tensor in state.items()}
        self.device = torch.device("cpu")
        self.dtype = torch.float32

    @classmethod
    def of(cls, module: nn.Module, model: dict[str, Any], preprocess: Preprocess | None = None) -> Clip:
        """The adapter over an open_clip model that `build_clip` made and someone trained."""
        return cls(model, {name: tensor.cpu().clone() for name, tensor in module.state_dict().items()}, preprocess)

    @classmethod
    def pretrained(cls, name: str, weights: str = "") -> Clip:
        """An open_clip model by name with a pretrained tag, or with a file of weights; or `local-dir:<folder>`, which
        has its own (unclip/clip/open_clip_folder.py).

        Raises Refused for an unknown name or tag, a file that does not fit, or weights that cannot be fetched.
        """
        import open_clip
        from open_clip.pretrained import get_pretrained_cfg

        files = files_of(name)
        model = open_clip.get_model_config(name) if files is None else model_config(files[0])
        if model is None:
            raise Refused(f"open_clip has no model {name!r}; it has {', '.join(open_clip.list_models())}")
        tag = get_pretrained_cfg(name, weights) if files is None else {}
        if files is None and not tag and not Path(weights).is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise Refused(f"{weights!r} is neither a file nor a pretrained tag of {name}, whose tags are {tags}")
        model["quick_gelu"] = bool(tag.get("quick_gelu", model.get("quick_gelu", False)))
        check_clip(model)
        wanted = {"pretrained": weights} if files is None else {}
        try:
            module = open_clip.create_model(name, **wanted, force_quick_gelu=model["quick_gelu"])
        except Exception as error:  # open_clip passes on whatever its downloader, unpickler or load_state_dict raised
            raise Refused(f"open_clip could not load {name} with {weights!r}: {error}") from error
        asked: dict[str, Any] = module.visual.preprocess_cfg
        size = asked["size"] if isinstance(asked["size"], int) else asked["size"][0]
        preprocess = Preprocess(
            size, tuple(asked["mean"]), tuple(asked["std"]), asked["interpolation"], asked["resize_mode"]
        )
        return cls.of(module, model, preprocess)

    @classmethod
    def load(cls, folder: Path | str) -> Clip:
        """Reads `save`'s folder; raises Refused where a file is missing, altered or of another schema."""
        folder = Path(folder)
        document = read_json(folder / CONFIG, "CLIP")
        if document.get("kind") != "clip":
            raise Refused(f"{folder} holds a {document.get('kind')!r}, and a CLIP was asked for")
        try:
            merges = read_text(folder / MERGES).splitlines()
        except (OSError, ValueError) as error:
            raise Refused(f"CLIP's tokeniser cannot be read: {error}") from None
        with explain_document(folder / CONFIG, "configuration of a CLIP"):
            settings: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in document["preprocess"].items()
            }
            clip = cls(document["model"], read_tensors(folder / WEIGHTS), Preprocess(**settings), merges)
            found, expected = clip.fingerprint, str(document["fingerprint"])
        if found != expected:
            raise Refused(
                f"the CLIP in {folder} was altered: its fingerprint is {found[:12]}, and {CONFIG} says "
                f"{expected[:12]}. Take an undamaged copy."
            )
        return clip

    def save(self, folder: Path | str) -> None:
        """Writes `config.json`, `merges.txt` and `model.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        document = {
            "kind": "clip",
            "model": self.config,
            "preprocess": asdict(self.preprocess),
            "tokenizer": self.tokenizer.digest,
            "fingerprint": self.fingerprint,
        }
        write_json(folder / CONFIG, document)
        (folder / MERGES).write_text("".join(f"{merge}\n" for merge in self.tokenizer.merges), encoding="utf-8")
        write_tensors(folder / WEIGHTS, self.state)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over architecture, tokeniser, preprocessing and every tensor: equal where embeddings are."""
        head = {"model": self.config, "preprocess": asdict(self.preprocess), "tokenizer": self.tokenizer.digest}
        total = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
        for name, tensor in sorted(self.state.items()):
            total.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return total.hexdigest()

    @property
    def embedding_width(self) -> int:
        """Width d of image and text embeddings."""
        return clip_widths(self.config)["embedding"]

    @property
    def text_width(self) -> int:
        """Width w of token states."""
        return clip_widths(self.config)["text_width"]

    @property
    def context_length(self) -> int:
        """Tokens of a text, L."""
        return clip_widths(self.config)["context"]

    @property
    def image_size(self) -> int:
        """Side of the image tower's input, in pixels."""
        return self.preprocess.size

    @property
    def ignores_padding(self) -> bool:
        """Whether nothing that stands behind a text's end token reaches its embedding."""
        return isinstance(self.text, TextTower) and self.text.causal

    def to(self, device: torch.device | str, precision: str | None = None) -> Clip:
        """Moves to a device, and computes in one of PRECISIONS from now on where one is named; returns itself.

        Weights are rounded to it, from those that were given, and so is what runs between the layers.
        """
        self.device = torch.device(device)
        dtype = self.dtype if precision is None else PRECISIONS[precision]
        for part in ("model", "images", "text"):
            if part in self.__dict__ and dtype == self.dtype:
                self.__dict__[part].to(self.device)
            else:
                self.__dict__.pop(part, None)  # built anew from the weights that were given
        self.dtype = dtype
        return self

    @cached_property
    def images(self) -> nn.Module:
        """The image tower, in evaluation mode (BatchNorm by its running statistics): ours where it can hold the model,
        else open_clip's."""
        if foreign_vision_settings(self.config):
            return self.model.visual  # type: ignore[return-value]
        self._check_image_tower()
        state = {name.removeprefix("visual."): t for name, t in self.state.items() if name.startswith("visual.")}
        return self._filled(image_tower, state)

    def _check_image_tower(self) -> None:
        if not any(name.startswith("visual.") for name in self.state):
            raise Refused(
                "this CLIP has no image tower, so it reads texts only: it was imported from a folder without an "
                "image_encoder. Import it again together with one (unclip releases import --images)."
            )

    @cached_property
    def model(self) -> nn.Module:
        """The whole open_clip model, frozen and in evaluation mode."""
        self._check_image_tower()
        # timm's towers read numbers out of tensors while they are built, which only real ones have.
        return self._filled(build_clip, self.state, on_meta=not self.config["vision_cfg"].get("timm_model_name"))

    @cached_property
    def text(self) -> nn.Module:
        """The text tower: ours where it can hold the model, else open_clip's."""
        if foreign_settings(self.config):
            from unclip.clip.text import OpenClipText

            return OpenClipText(self.model)
        prefix = "text." if self.config.get("custom_text") else ""
        others = ("visual.", "logit_scale", "logit_bias")
        state = {
            name.removeprefix(prefix): tensor for name, tensor in self.state.items() if not name.startswith(others)
        }
        return self._filled(TextTower, state)

    def _filled(
        self, build: Callable[[dict[str, Any]], nn.Module], state: dict[str, Tensor], *, on_meta: bool = True
    ) -> nn.Module:
        """A tower with these weights, frozen. on_meta: compare shapes before anything as large as they say is built."""
        unfit = "these weights do not fit this CLIP's configuration:"
        if on_meta:
            with weightless():
                needed = {name: tensor.shape for name, tensor in build(self.config).state_dict().items()}
            if wrong := shape_mismatch({name: tensor.shape for name, tensor in state.items()}, needed):
                raise Refused(f"{unfit} {wrong}")
        module = build(self.config)
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise Refused(f"{unfit} {shorten(str(error), 300)}") from None
        return module.requires_grad_(False).eval().to(self.device, self.dtype)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """int64 [b, L]."""
        return self.tokenizer(texts)

    def truncated(self, texts: Sequence[str]) -> list[str]:
        """For each text, what of it exceeds the context and is not seen; "" where all is."""
        return [self.tokenizer.truncated(text) for text in texts]

    def tell_cut(self, texts: Sequence[str]) -> None:
        """Logs a warning for each text of which the context does not hold all: its end is cut off and not seen."""
        for text in dict.fromkeys(texts):
            if cut := self.tokenizer.truncated(text):
                log.warning("the prompt %r is too long for this release; %r at its end is not seen", text, cut)

    @torch.no_grad()
    def encode_images(self, pictures: Tensor) -> Tensor:
        """uint8 [b, 3, h, w], or floats in [0, 1] → raw embeddings [b, d] on this CLIP's device."""
        return self.encode_pixels(self.preprocess(pictures.to(self.device)))

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """What `preprocess` gives, [b, 3, size, size] on this CLIP's device → raw embeddings [b, d]."""
        return self.images(pixels.to(self.dtype)).float()

    def encode_text(self, texts: Sequence[str]) -> Text:
        """Raw embeddings [b, d], token states after the final norm [b, L, w], and which of them are no padding."""
        return self.encode_tokens(self.tokenize(texts).to(self.device))

    @torch.no_grad()
    def encode_tokens(self, ids: Tensor) -> Text:
        """The same of `tokenize`'s rows on this CLIP's device, [b, L]; or of their first columns, [b, n], where all the
        texts end in these and this CLIP `ignores_padding`."""
        embedding, states, mask = self.text(ids)
        return Text(embedding.float(), states.float(), mask)


def _side(model: dict[str, Any]) -> int:
    size = model["vision_cfg"].get("image_size", 224)
    return int(size if isinstance(size, int) else size[0])
