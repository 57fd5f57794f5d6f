"""A model on disk: a folder with `config.json` and `model.safetensors`. Nothing in it is ever executed.

Every model of a release has this layout; `config.json` carries the schema version and the kind, so that a folder of
another kind, or one written by another unclip, is refused before a tensor is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unclip.config import mistyped
from unclip.errors import Refused
from unclip.files import (
    CONFIG,
    WEIGHTS,
    explain_document,
    explain_tensors,
    read_json,
    read_tensors,
    shape_mismatch,
    write_json,
    write_tensors,
)
from unclip.meta import weightless
from unclip.models import (
    AutoregressivePrior,
    AutoregressivePriorConfig,
    Classifier,
    ClassifierConfig,
    Decoder,
    DecoderConfig,
    DiffusionPrior,
    NoisedClip,
    NoisedClipConfig,
    PriorConfig,
    Upsampler,
    UpsamplerConfig,
)

GAMMA = "gamma.safetensors"
"""Beside a model that Analytic-DPM samples: its table of γ (unclip/diffusion/analytic.py)."""


class Kind(NamedTuple):
    """One kind of model folder."""

    config: type
    """A frozen dataclass of plain values."""
    module: type[nn.Module]
    """What is built of such a configuration."""
    part: str = ""
    """The component of a release that it can be (folder.py); `upsampler` for any of those; empty: none."""


KINDS: dict[str, Kind] = {
    "prior": Kind(PriorConfig, DiffusionPrior, "prior"),
    "ar_prior": Kind(AutoregressivePriorConfig, AutoregressivePrior, "prior"),
    "decoder": Kind(DecoderConfig, Decoder, "decoder"),
    "inpainter": Kind(DecoderConfig, Decoder, "inpainter"),
    "upsampler": Kind(UpsamplerConfig, Upsampler, "upsampler"),
    "classifier": Kind(ClassifierConfig, Classifier, "classifier"),
    "noised_clip": Kind(NoisedClipConfig, NoisedClip, "noised-clip"),
}
"""Every kind of model folder but CLIP's, whose form is its own."""


def kinds_of(part: str) -> tuple[str, ...]:
    """The kinds of model that can be that component of a release."""
    return tuple(kind for kind, row in KINDS.items() if row.part == part)


FREE = {"dropout", "size", "inpaint"}
"""Settings that weights do not depend on: those in which a warm start may differ from its model."""


def save_model(folder: Path, kind: str, config: Any, state: dict[str, Tensor], *, clip: str | None = None) -> None:
    """Writes a model of one of the `KINDS`.

    config: its PriorConfig, DecoderConfig, …. state: the weights to keep (the averaged ones). clip: the fingerprint of
    the CLIP whose embeddings it was trained on; None for an upsampler or a classifier, which see none.
    """
    if kind not in KINDS:
        raise Refused(f"model kind {kind!r} is unknown; use one of {', '.join(KINDS)}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, {"kind": kind, "config": _document(config), "clip": clip})
    write_tensors(folder / WEIGHTS, state)


def _document(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON, without what `UNSAID` leaves out."""
    unsaid = {item.name: item.default for item in fields(config) if item.metadata.get("unsaid")}
    return {name: value for name, value in asdict(config).items() if name not in unsaid or value != unsaid[name]}


def read_model_config(folder: Path, *kinds: str) -> tuple[Any, str | None]:
    """(configuration, CLIP fingerprint) of a model's folder, without its tensors; raises Refused for another kind."""
    kind, document = _kind(folder, kinds)
    with explain_document(folder / CONFIG, f"configuration of a {kind}"):
        return config_from(kind, document["config"], str(folder / CONFIG)), document.get("clip")


def config_from(kind: str, values: dict[str, Any], where: str) -> Any:
    """The configuration of that kind from plain JSON; raises Refused for fields that it does not know."""
    config_type = KINDS[kind].config
    known = {field.name for field in fields(config_type)}
    if unknown := sorted(set(values) - known):
        raise Refused(f"{where} has settings that this unclip's {kind} does not know: {', '.join(unknown)}")
    values = {name: _tuples(value) for name, value in values.items()}
    if wrong := mistyped(config_type, values):
        raise Refused(f"{where}: {wrong}")
    try:
        return config_type(**values)
    except TypeError as error:
        raise Refused(f"{where} is no configuration of a {kind}: {error}") from None


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that a configuration has, also inside of one another."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def load_model(folder: Path, *kinds: str) -> nn.Module:
    """The model of a folder, one of those kinds, frozen and in evaluation mode.

    Raises Refused for another kind, or where its tensors do not fit its config.
    """
    config, _ = read_model_config(folder, *kinds)
    kind, _ = _kind(folder, kinds)
    with explain_document(folder / CONFIG, f"configuration of a {kind}"):
        with weightless():  # its shapes cost nothing; what does not fit the file is never built
            needed = KINDS[kind].module(config).state_dict()
        check_shapes(folder / WEIGHTS, needed)
        model = KINDS[kind].module(config)
    tensors = read_tensors(folder / WEIGHTS)
    check_numbers(folder / WEIGHTS, tensors, needed)
    model.load_state_dict(tensors)
    return model.requires_grad_(False).eval()


def check_shapes(path: Path, needed: Mapping[str, Tensor]) -> None:
    """Raises Refused unless a file's header names just these tensors, in these shapes; reads nothing else of it."""
    from safetensors import safe_open

    with explain_tensors(path), safe_open(path, "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    if wrong := shape_mismatch(found, {name: tuple(tensor.shape) for name, tensor in needed.items()}):
        raise Refused(f"{path} does not fit its {CONFIG}: {wrong}")


def check_numbers(path: Path, tensors: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> None:
    """Raises Refused where a file holds another kind of number than is needed: copying would round, cut off an
    imaginary part, or take any number for True, without a word."""
    for name, tensor in tensors.items():
        if name in needed and _number_kind(tensor) != _number_kind(needed[name]):
            raise Refused(f"{path} holds {tensor.dtype} in {name}, and {needed[name].dtype} is needed")


def _number_kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    """Tells floating-point, complex and boolean tensors from each other and from integers, whatever their width."""
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def warm_start(model: nn.Module, folder: Path, *kinds: str, clip: str | None = None) -> None:
    """Gives a new model the weights of a finished one in a folder, of one of those kinds: a record's, or a release's
    component. Its buffers too: statistics of embeddings and the empty text, which the weights were trained with.

    What the finished model lacks must be zero at the new one's start, so that both give the same outputs: parts that
    are added start silent. clip: the fingerprint that the finished model must have been trained on. Raises Refused for
    another CLIP or kind, for settings or shapes in which the two differ, and for weights that the new model lacks.
    """
    config, trained_on = read_model_config(folder, *kinds)
    if clip is not None and trained_on != clip:
        raise Refused(
            f"the model in {folder} was trained on the CLIP {str(trained_on)[:12]}…, and this one is for the CLIP "
            f"{clip[:12]}…: their embeddings mean different things"
        )
    finished, new = read_tensors(folder / WEIGHTS), model.state_dict()
    both = {name: (value, getattr(model.config, name, value)) for name, value in asdict(config).items()}
    wrong = [f"its {name} is {a}, and {b} is asked for" for name, (a, b) in both.items() if a != b and name not in FREE]
    wrong += [f"the new model has no {name}" for name in sorted(set(finished) - set(new))]
    for name, tensor in new.items():
        if name not in finished and bool(tensor.any()):
            wrong.append(f"{name} is missing")
        elif name in finished and finished[name].shape != tensor.shape:
            wrong.append(f"{name} is {list(finished[name].shape)}, and {list(tensor.shape)} is needed")
    if wrong:
        raise Refused(f"a warm start from {folder} is impossible: {'; '.join(wrong[:3])}{' …' * (len(wrong) > 3)}")
    model.load_state_dict(finished, strict=False)


def save_gamma(folder: Path, gamma: Tensor) -> None:
    """Writes a model's table of γ [timesteps], from `unclip.diffusion.analytic.estimate_gamma`, into its folder."""
    write_tensors(folder / GAMMA, {"gamma": gamma.double()})


def load_gamma(folder: Path, steps: int) -> Tensor:
    """The table of γ in a model's folder, float64 [steps]; raises Refused where it is of another process."""
    found = read_tensors(folder / GAMMA)
    if set(found) != {"gamma"} or found["gamma"].shape != (steps,):
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        raise Refused(
            f"{folder / GAMMA} holds {shapes}, and this model's process has {steps} timesteps: gamma [{steps}]"
        )
    return found["gamma"].double()


def _kind(folder: Path, kinds: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(kind, document) of a model's folder."""
    document = read_json(folder / CONFIG, kinds[0])
    for kind in kinds:
        if document.get("kind") == kind:
            return kind, document
    raise Refused(f"{folder} holds a {document.get('kind')!r}, and a {' or '.join(map(repr, kinds))} was asked for")
