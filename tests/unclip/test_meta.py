"""What is built without weights has the names, shapes and types of what is built with them, and imports no compiler."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import nn

from unclip.clip.model import build_clip
from unclip.clip.text import TextTower
from unclip.clip.vision import image_tower
from unclip.meta import weightless
from unclip.models.classifier import ClassifierConfig
from unclip.models.noised_clip import NoisedClipConfig
from unclip.presets import TINY
from unclip.release.model import KINDS

assert TINY.encoder is not None
CONFIGS = {
    "prior": TINY.prior,
    "ar_prior": TINY.ar_prior,
    "decoder": TINY.decoder,
    "inpainter": replace(TINY.decoder, inpaint=True),
    "upsampler": TINY.upsamplers[0],
    "classifier": ClassifierConfig(**vars(TINY.encoder), labels=("shape",), classes=(("circle", "square"),)),
    "noised_clip": NoisedClipConfig(**vars(TINY.encoder), embedding=32),
}
VIT = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
VISIONS = {
    "vit": VIT,
    "pooled": {**VIT, "attentional_pool": True, "ls_init_value": 0.1},
    "averaged": {**VIT, "pool_type": "avg", "pos_embed_type": "sin_cos_2d"},
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
}


def clip(vision: str, *, custom: bool) -> dict[str, object]:
    text = {"context_length": 16, "vocab_size": 2000, "width": 32, "heads": 2, "layers": 1}
    return {
        "embed_dim": 32,
        "vision_cfg": VISIONS[vision],
        "text_cfg": text,
        **({"custom_text": True} if custom else {}),
    }


OURS: dict[str, Callable[[], nn.Module]] = {
    **{kind: lambda kind=kind: KINDS[kind].module(CONFIGS[kind]) for kind in KINDS},
    **{f"our-{vision}": lambda vision=vision: image_tower(clip(vision, custom=False)) for vision in ("vit", "resnet")},
    "text": lambda: TextTower(clip("vit", custom=False)),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    **OURS,
    **{vision: lambda vision=vision: build_clip(clip(vision, custom=False)) for vision in VISIONS},
    **{f"custom-{vision}": lambda vision=vision: build_clip(clip(vision, custom=True)) for vision in VISIONS},
}


@pytest.mark.parametrize("name", MODELS)
def test_names_shapes_and_types_are_those_of_the_real_model(name: str) -> None:
    with weightless():
        without = MODELS[name]()
    tensors = [{**dict(model.named_buffers()), **model.state_dict()} for model in (without, MODELS[name]())]
    found, expected = ([(n, t.shape, t.dtype) for n, t in sorted(of.items())] for of in tensors)
    assert found == expected
    assert all(tensor.is_meta for tensor in tensors[0].values())


ALONE = """
import json, sys
from tests.unclip.test_meta import OURS
from unclip.meta import weightless
slow = []
for name, make in OURS.items():
    with weightless():
        make()
    if "torch._dynamo" in sys.modules:
        slow.append(name)
print(json.dumps(slow))
"""


@pytest.mark.slow
def test_the_compiler_is_imported_for_none_of_ours() -> None:
    """open_clip's package imports it; what trains a CLIP, or holds an unusual tower, builds from there."""
    ran = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == []
