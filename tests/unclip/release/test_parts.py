"""Releases with other parts than usual: without a prior, with an inpainter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.fixtures.plain import ours
from tests.fixtures.release import SAMPLING, shaken, write_inpainter, write_parts
from unclip import UnCLIP, manipulate
from unclip.diffusion.settings import Sampling
from unclip.errors import Refused
from unclip.interop.diffusers import export_diffusers
from unclip.models.decoder import Decoder
from unclip.presets import TINY
from unclip.release.folder import save_release
from unclip.release.model import load_model, save_model, warm_start

GLIDE = replace(TINY.decoder, text="own", vocabulary=2000, text_depth=1, text_heads=4, image=False)
WITHOUT_PRIOR = {name: settings for name, settings in SAMPLING.items() if name != "prior"}


def fingerprint(parts: dict[str, Path]) -> str:
    return json.loads((parts["clip"] / "config.json").read_text())["fingerprint"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Component name → folder: those of a usual release, a decoder for prompts alone, an inpainter of the decoder."""
    folder = tmp_path_factory.mktemp("parts")
    made = write_inpainter(write_parts(folder))
    glide = shaken(Decoder(GLIDE), 9)
    save_model(folder / "glide", "decoder", GLIDE, glide.state_dict(), clip=fingerprint(made))
    return made | {"glide": folder / "glide"}


@pytest.fixture(scope="module")
def prompts_only(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> UnCLIP:
    folder = tmp_path_factory.mktemp("glide") / "release"
    chosen = {name: parts[name] for name in ("clip", "upsampler-32", "upsampler-64")} | {"decoder": parts["glide"]}
    save_release(folder, "glide", chosen, WITHOUT_PRIOR)
    model = UnCLIP.load(folder)
    model.tile = 2
    return model


@pytest.fixture(scope="module")
def filling(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> UnCLIP:
    folder = tmp_path_factory.mktemp("filling") / "release"
    save_release(folder, "tiny", {name: path for name, path in parts.items() if name != "glide"}, SAMPLING)
    model = UnCLIP.load(folder)
    model.tile = 2
    return model


def pictures(n: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(256, (n, 3, 64, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_a_release_without_a_prior_draws_from_prompts(prompts_only: UnCLIP):
    assert prompts_only.components == ["decoder", "upsampler-32", "upsampler-64"]
    assert prompts_only.prior is None
    one, other, again = prompts_only.generate(["a red circle", "a blue square", "a red circle"], seeds=[1, 1, 1])
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert manipulate.unconditional(prompts_only, 1).shape == (1, 3, 64, 64)
    for name, tensor in prompts_only.decoder.state_dict().items():
        assert tensor.isfinite().all(), name


def test_it_edits_what_needs_no_image_embedding_and_refuses_the_rest(prompts_only: UnCLIP):
    shown = pictures()
    assert manipulate.redraw(prompts_only, shown, ["a", "b"], strength=0.5).shape == (2, 3, 64, 64)
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[:, :32] = True
    drawn = manipulate.inpaint(prompts_only, shown, masks, ["a", "b"])
    assert torch.equal(drawn[:, :, 32:], shown[:, :, 32:])
    for refused in (
        lambda: manipulate.variations(prompts_only, shown),
        lambda: manipulate.interpolate(prompts_only, shown[0], shown[1]),
        lambda: manipulate.interpolate_prompts(prompts_only, "a", "b"),
        lambda: manipulate.text_diff(prompts_only, shown[0], "a", "b"),
        lambda: manipulate.probe(prompts_only, shown, torch.eye(32), torch.zeros(32), [4]),
    ):
        with pytest.raises(Refused, match="draws from prompts alone"):
            refused()
    with pytest.raises(Refused, match="no prior to guide"):
        prompts_only.generate(["a"], prior_guidance=2.0)


def test_a_decoder_may_read_for_itself_and_see_an_image_embedding_too(filling: UnCLIP):
    both = shaken(Decoder(replace(GLIDE, image=True, learned_range=False, prediction="v")), 4)
    settings = {name: SAMPLING[name] for name in ("prior", "decoder")}
    model = UnCLIP(filling.clip, filling.prior, both, [], settings, tile=2)
    red, blue, empty = model.generate(["a red circle", "a blue square", ""], seeds=[0, 0, 0])
    assert not torch.equal(red, blue)
    assert not torch.equal(red, empty)
    z = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).expand(2, -1)
    one, other = model.decode(z, ["a red circle", "a blue square"], seeds=[0, 0])
    assert not torch.equal(one, other)  # under one z_i the caption alone differs
    assert manipulate.variations(model, pictures(1), n=2).shape == (2, 3, 16, 16)


def test_a_decoder_of_clips_token_states_may_do_without_image_embeddings(filling: UnCLIP):
    alone = shaken(Decoder(replace(TINY.decoder, image=False)), 4)
    model = UnCLIP(filling.clip, None, alone, [], {"decoder": SAMPLING["decoder"]}, tile=2)
    one, other = model.generate(["a red circle", "a blue square"], seeds=[0, 0])
    assert not torch.equal(one, other)


def test_a_prior_and_a_decoder_of_image_embeddings_come_together_or_not_at_all(parts: dict[str, Path], tmp_path: Path):
    usual = {name: path for name, path in parts.items() if name not in ("glide", "inpainter")}
    with pytest.raises(Refused, match="has no prior"):
        save_release(tmp_path / "a", "tiny", {n: p for n, p in usual.items() if n != "prior"}, WITHOUT_PRIOR)
    with pytest.raises(Refused, match="nothing would use the prior"):
        save_release(tmp_path / "b", "tiny", usual | {"decoder": parts["glide"]}, SAMPLING)


def test_a_decoder_for_another_tokeniser_is_refused(parts: dict[str, Path], tmp_path: Path):
    other = replace(GLIDE, vocabulary=1999)
    save_model(tmp_path / "decoder", "decoder", other, Decoder(other).state_dict(), clip=fingerprint(parts))
    chosen = {"clip": parts["clip"], "decoder": tmp_path / "decoder"}
    with pytest.raises(Refused, match="made for vocabulary 1999, and CLIP's is 2000"):
        save_release(tmp_path / "release", "tiny", chosen, {"decoder": Sampling()})


def test_diffusers_has_no_place_for_it(prompts_only: UnCLIP, tmp_path: Path):
    with pytest.raises(Refused, match="draws from prompts alone, without a prior"):
        export_diffusers(prompts_only, tmp_path / "folder")


def test_diffusers_cannot_hold_a_text_transformer_of_the_decoders_own(filling: UnCLIP, tmp_path: Path):
    own = Decoder(replace(GLIDE, image=True))
    model = UnCLIP(filling.clip, filling.prior, own, filling.upsamplers, SAMPLING)
    with pytest.raises(Refused, match="a text transformer of its own"):
        export_diffusers(model, tmp_path / "folder")


def test_an_inpainter_begins_as_the_decoder_it_was_made_of(filling: UnCLIP, parts: dict[str, Path]):
    fresh = Decoder(replace(TINY.decoder, inpaint=True))
    warm_start(fresh, parts["decoder"], "decoder", clip=fingerprint(parts))
    x, t, z = torch.randn(2, 3, 16, 16), torch.tensor([30, 700]), torch.randn(2, 32)
    caption = filling.captions(["a red circle", "a"])
    plain = filling.decoder(x, t, filling.decoder.context(z, *caption))
    free = torch.rand(2, 1, 16, 16) > 0.5
    told = fresh.knowing(fresh.context(z, *caption), torch.randn(2, 3, 16, 16), free)
    assert torch.equal(fresh(x, t, told), plain)
    assert plain.std() > 0.01


def test_an_inpainter_that_knows_nothing_draws_as_one_that_was_told_nothing(filling: UnCLIP):
    network = filling.inpainter
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([30, 700])
    context = network.context(torch.randn(2, 32), *filling.captions(["a red circle", "a"]))
    free = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    picture = torch.rand(2, 3, 16, 16)
    assert torch.equal(network(x, t, network.knowing(context, picture, free)), network(x, t, context))
    free[:, :, :8] = False
    knows = network(x, t, network.knowing(context, picture, free))
    assert not torch.allclose(knows, network(x, t, context), atol=1e-3)
    hidden = torch.where(free, -picture, picture)  # what is erased is not there to be seen
    assert torch.equal(network(x, t, network.knowing(context, hidden, free)), knows)


def test_the_inpainter_draws_where_there_is_one_and_known_pixels_stay(filling: UnCLIP):
    shown, masks = pictures(), torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[:, 16:40, 8:50] = True
    prompts = ["a red circle", "a blue square"]
    drawn = {how: manipulate.inpaint(filling, shown, masks, prompts, trained=how) for how in (None, True, False)}
    assert torch.equal(drawn[None], drawn[True])
    assert not torch.equal(drawn[True], drawn[False])
    stays = ~masks[:, None].expand_as(shown)
    for picture in drawn.values():
        assert torch.equal(picture[stays], shown[stays])
    without = UnCLIP(filling.clip, filling.prior, filling.decoder, filling.upsamplers, filling.sampling, tile=2)
    assert torch.equal(manipulate.inpaint(without, shown, masks, prompts), drawn[False])
    with pytest.raises(Refused, match="has no inpainter"):
        manipulate.inpaint(without, shown, masks, prompts, trained=True)
    assert torch.equal(without.generate(prompts), filling.generate(prompts))  # nothing else is changed by it


def test_diffusers_leaves_an_inpainter_out_and_says_so(tmp_path: Path):
    model = ours()
    inpainter = Decoder(replace(model.decoder.config, inpaint=True))
    parts = model.clip, model.prior, model.decoder, model.upsamplers, model.sampling
    told = export_diffusers(UnCLIP(*parts, inpainter=inpainter), tmp_path / "folder")
    assert told.left_out == ("upsampler-64", "inpainter")


def test_an_inpainter_that_cannot_stand_in_for_the_decoder_is_refused(parts: dict[str, Path], tmp_path: Path):
    usual = {name: path for name, path in parts.items() if name not in ("glide", "inpainter")}
    can = replace(TINY.decoder, inpaint=True)
    cases = (
        (TINY.decoder, "no channels for what is known"),
        (replace(can, size=32, attention=(16,)), "size 32"),
        (replace(can, timesteps=10), "timesteps 10, and the decoder 1000"),
        (replace(can, schedule="linear"), "schedule linear"),
        (replace(can, learned_range=not can.learned_range), "learned_range"),
    )
    for number, (config, said) in enumerate(cases):
        folder = tmp_path / f"inpainter-{number}"
        save_model(folder, "inpainter", config, Decoder(config).state_dict(), clip=fingerprint(parts))
        with pytest.raises(Refused, match=said):
            save_release(tmp_path / f"release-{number}", "tiny", usual | {"inpainter": folder}, SAMPLING)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"channels": 32}, "its channels is 16, and 32 is asked for"),
        ({"prediction": "v"}, "its prediction is eps, and v is asked for"),
        ({"text_depth": 1, "text_heads": 4}, "text_depth"),
        ({"image": False}, "its image is True"),
    ],
)
def test_a_warm_start_of_another_model_is_refused(parts: dict[str, Path], changes: dict, said: str):
    with pytest.raises(Refused, match=said):
        warm_start(Decoder(replace(TINY.decoder, **changes)), parts["decoder"], "decoder")


def test_a_warm_start_takes_all_of_a_model_and_the_same_clip_alone(parts: dict[str, Path]):
    new = Decoder(replace(TINY.decoder, dropout=0.3))
    warm_start(new, parts["decoder"], "decoder")
    state = load_model(parts["decoder"], "decoder").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in new.state_dict().items())
    with pytest.raises(Refused, match="was trained on the CLIP"):
        warm_start(new, parts["decoder"], "decoder", clip="feed" * 16)
    with pytest.raises(Refused, match="holds a 'prior'"):
        warm_start(new, parts["prior"], "decoder")
