"""Folders that mean harm: signed by whoever made them, so that no digest gives them away. Each is refused, soon."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures.hostile import rewrite, signed
from unclip import UnCLIP
from unclip import files as documents
from unclip.errors import Refused
from unclip.interop.clip import read_clip

DEEP = b"[" * 100_000
SECONDS = 10.0
"""Far more than a refusal takes, far less than building a million layers does."""


def configured(component: str, **settings: Any) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        document = json.loads((folder / component / "config.json").read_text())
        document["config"] |= settings
        signed(folder, f"{component}/config.json", json.dumps(document).encode())

    return harm


def sampled(**settings: Any) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        document = json.loads((folder / "release.json").read_text())
        document["sampling"]["decoder"] |= settings
        rewrite(folder / "release.json", json.dumps(document).encode())

    return harm


def cast(dtype: torch.dtype) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        state = {name: tensor.to(dtype) for name, tensor in load_file(folder / "prior/model.safetensors").items()}
        save_file(state, folder / "cast.safetensors")
        signed(folder, "prior/model.safetensors", (folder / "cast.safetensors").read_bytes())

    return harm


def headed(header: bytes) -> Callable[[Path], None]:
    return lambda folder: signed(folder, "decoder/model.safetensors", struct.pack("<Q", len(header)) + header)


def piped(folder: Path) -> None:
    (folder / "release.json").unlink()
    os.mkfifo(folder / "release.json")


ENDLESS = b'{"a":{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[0,0]}}'
HARMS = {
    "nested": (lambda folder: rewrite(folder / "release.json", DEEP), "nested too deeply"),
    "nested config": (lambda folder: signed(folder, "decoder/config.json", DEEP), "nested too deeply"),
    "pipe": (piped, "no regular file"),
    "merges": (lambda folder: signed(folder, "clip/merges.txt", b"\xff\xfe"), "tokeniser cannot be read"),
    "header": (headed(ENDLESS), "does not fit its config.json"),
    "a million blocks": (configured("decoder", depth=10**6), r"depth is 1000000; it must be at most 1,024"),
    "a million layers": (configured("prior", depth=10**6), r"depth is 1000000; it must be at most 1,024"),
    "a wide decoder": (configured("decoder", channels=2**20), "does not fit its config.json"),
    "a wide prior": (configured("prior", width=2**20), "does not fit its config.json"),
    "a prior of 10 GB": (configured("prior", width=2**14), r"does not fit its config.json: .* is needed"),
    "half a timestep": (configured("prior", timesteps=10.5), r"timesteps is 10\.5; it must be of type int"),
    "a true width": (configured("prior", heads=True), "heads is True; it must be of type int"),
    "texts for numbers": (configured("decoder", attention=["a"]), "attention is"),
    "integers": (cast(torch.int64), r"holds torch.int64 in .*, and torch.float32 is needed"),
    "imaginary": (cast(torch.complex64), r"holds torch.complex64 in"),
    "three ends": (sampled(interval=[1, 2, 3]), r"sampling of decoder: interval is \(1, 2, 3\)"),
    "labels": (sampled(labels=5), "sampling of decoder: labels is 5"),
    "steps": (sampled(steps=True), "sampling of decoder: steps is True; it must be of type int"),
}


@pytest.mark.parametrize("case", HARMS)
def test_a_release_that_means_harm_is_refused(case: str, folder: Path) -> None:
    harm, said = HARMS[case]
    harm(folder)
    began = time.monotonic()
    with pytest.raises(Refused, match=said) as refused:
        UnCLIP.load(folder)
    assert time.monotonic() - began < SECONDS
    assert len(str(refused.value)) < 1000


def test_weights_of_half_the_width_are_taken_as_they_are_rounded(folder: Path) -> None:
    """What is refused is another kind of number, not another width: a release may be kept in 16 bits."""
    parts = load_file(folder / "decoder/model.safetensors")
    halved = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in parts.items()}
    save_file(halved, folder / "halved.safetensors")
    signed(folder, "decoder/model.safetensors", (folder / "halved.safetensors").read_bytes())
    for name, tensor in UnCLIP.load(folder).decoder.state_dict().items():
        if name in parts and tensor.is_floating_point():
            assert torch.equal(tensor, parts[name].half().float())


def test_a_huge_document_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_BYTES", 100)
    with pytest.raises(Refused, match="more than 100 bytes"):
        UnCLIP.load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", 1.5), ("hidden_size", "a"), ("num_hidden_layers", 10**6), ("vocab_size", [1]), ("image_size", 0),
     ("num_attention_heads", True), ("intermediate_size", None), ("projection_dim", 2**40)],
)  # fmt: skip
def test_sizes_of_a_foreign_clip_are_whole_numbers_in_range(key: str, value: Any) -> None:
    with pytest.raises(Refused, match=rf"config\.json has {key} = .*; it must be a whole number from 1 to"):
        read_clip({key: value}, {}, [], None, None, None)
