"""Which parts go together: every combination of decoder, prior and optional parts works, or is refused with the reason.

The table is the documentation; each row is a cascade of random weights, used in every way there is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fixtures.plain import models, shaken
from unclip import UnCLIP, manipulate
from unclip.diffusion.settings import Sampling
from unclip.errors import Refused
from unclip.interop.diffusers import export_diffusers
from unclip.models.ar_prior import AutoregressivePrior
from unclip.models.classifier import Classifier, ClassifierConfig
from unclip.models.decoder import Decoder
from unclip.models.noised_clip import NoisedClip, NoisedClipConfig
from unclip.presets import TINY
from unclip.release.guides import Guides

OWN = {"text": "own", "vocabulary": 2000, "text_depth": 1, "text_heads": 4}
DECODERS: dict[str, dict[str, Any]] = {"clip": {}, "own": OWN, "prompts": OWN | {"image": False}}
"""How a decoder reads: by CLIP; by a text transformer of its own beside z_i; so, and without z_i (GLIDE)."""
PRIORS = ("diffusion", "analytic", "autoregressive", "none")
"""analytic: a diffusion prior with its table of γ, sampled by Analytic-DPM."""

NO_PRIOR = "has no prior, and its decoder draws from the image embeddings"
UNUSED = "nothing would use the prior"
NO_EMBEDDING = "to its decoder a picture has no image embedding"
EXPORTS = {
    "none": "draws from prompts alone, without a prior",
    "autoregressive": "AutoregressivePrior, and PriorTransformer is a diffusion prior",
    "own": "a text transformer of its own",
}
"""Why diffusers cannot hold a cascade with such a prior or decoder; the others it holds."""


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    """Every part by name."""
    clip, prior, decoder, upsamplers = models(upsampler={"antialias": True})
    assert TINY.ar_prior is not None
    assert TINY.encoder is not None
    labelled = ClassifierConfig(**vars(TINY.encoder), labels=("shape",), classes=(("circle", "square"),))
    parts: dict[str, Any] = {"clip": clip, "diffusion": prior, "analytic": prior, "none": None}
    parts |= {"autoregressive": shaken(AutoregressivePrior(TINY.ar_prior), 6), "upsamplers": upsamplers[:1]}
    for seed, (name, changes) in enumerate(DECODERS.items()):
        config = replace(TINY.decoder, **changes)
        parts[f"{name} decoder"] = shaken(Decoder(config), 10 + seed)
        parts[f"{name} inpainter"] = shaken(Decoder(replace(config, inpaint=True)), 20 + seed)
    parts["clip decoder"] = decoder  # with the empty text that diffusers asks for
    noised = NoisedClipConfig(**vars(TINY.encoder), embedding=32)
    parts["guides"] = Guides(shaken(Classifier(labelled), 30), shaken(NoisedClip(noised), 31))
    return parts


def cascade(built: dict[str, Any], decoder: str, prior: str, optional: bool, upsamplers: int = 0) -> UnCLIP:
    settings = {"decoder": Sampling("ddim", 2, guidance=2.0)}
    gamma = None
    if prior != "none":
        sampler = "analytic_dpm" if prior == "analytic" else "ddim"
        settings["prior"] = Sampling(sampler, 2, guidance=2.0)
        gamma = {"prior": torch.linspace(0.1, 1, 1000)} if prior == "analytic" else None
    how: dict[str, Any] = {"inpainter": built[f"{decoder} inpainter"], "guides": built["guides"]} if optional else {}
    parts = built["clip"], built[prior], built[f"{decoder} decoder"], built["upsamplers"][:upsamplers], settings
    return UnCLIP(*parts, tile=1, gamma=gamma, **how)


def check(call: Callable[[], Tensor], refused: str | None) -> None:
    if refused:
        with pytest.raises(Refused, match=refused):
            call()
        return
    drawn = call()
    assert drawn.shape[1:] == (3, 16, 16)
    assert drawn.float().std() > 5


@pytest.mark.parametrize("optional", [False, True], ids=["bare", "guides and inpainter"])
@pytest.mark.parametrize(("decoder", "prior"), product(DECODERS, PRIORS))
def test_every_combination_works_or_is_refused_with_the_reason(
    built: dict[str, Any], tmp_path: Path, decoder: str, prior: str, optional: bool
) -> None:
    if (decoder == "prompts") != (prior == "none"):
        with pytest.raises(Refused, match=NO_PRIOR if prior == "none" else UNUSED):
            cascade(built, decoder, prior, optional)
        return
    model = cascade(built, decoder, prior, optional)
    picture = torch.randint(256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[:, 8:24, 8:24] = True
    words, alone = ["a red circle"], NO_EMBEDDING if decoder == "prompts" else None
    check(lambda: model.generate(words), None)
    check(lambda: model.generate(words, labels={"shape": "circle"}), None if optional else "needs a classifier")
    check(lambda: model.generate(words, clip_guidance=2.0), None if optional else "CLIP that reads noised pictures")
    check(lambda: model.generate(words, prior_guidance=3.0), "no prior to guide" if prior == "none" else None)
    check(lambda: manipulate.unconditional(model, 1), None)
    check(lambda: manipulate.redraw(model, picture, words, strength=0.5), None)
    check(lambda: manipulate.inpaint(model, picture, mask, words), None)
    check(lambda: manipulate.inpaint(model, picture, mask, words, trained=True), None if optional else "no inpainter")
    check(lambda: manipulate.variations(model, picture, n=1), alone)
    check(lambda: manipulate.interpolate(model, picture[0], picture[0].flip(1), steps=2), alone)
    check(lambda: manipulate.interpolate_prompts(model, "a red circle", "a blue square", steps=2), alone)
    check(lambda: manipulate.text_diff(model, picture[0], "a red circle", "a blue square", steps=2), alone)
    check(lambda: manipulate.probe(model, picture, torch.eye(32), torch.zeros(32), [4]), alone)
    whole = cascade(built, decoder, prior, optional, upsamplers=1)
    if why := EXPORTS.get(prior) or EXPORTS.get(decoder):
        with pytest.raises(Refused, match=why):
            export_diffusers(whole, tmp_path / "folder")
        return
    left_out = ("prior/gamma",) if prior == "analytic" else ()
    left_out += ("inpainter", "classifier", "noised-clip") if optional else ()
    assert export_diffusers(whole, tmp_path / "folder").left_out == left_out


@pytest.mark.parametrize(
    ("prior", "name", "length", "said"),
    [
        ("autoregressive", "prior", 1000, "this cascade's prior has no process of noise"),
        ("diffusion", "prior", 999, "999 entries for the prior, and this cascade's prior has 1000 timesteps"),
        ("diffusion", "upsampler-64", 1000, "this cascade's upsampler-64 has no process"),
    ],
)
def test_a_table_of_gamma_is_of_one_of_its_models(built: dict[str, Any], prior: str, name: str, length: int, said: str):
    parts = built["clip"], built[prior], built["clip decoder"], built["upsamplers"]
    with pytest.raises(Refused, match=said):
        UnCLIP(*parts, gamma={name: torch.ones(length)})
