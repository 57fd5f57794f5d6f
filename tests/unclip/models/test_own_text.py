"""A decoder with a text transformer of its own, with and without image embeddings."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.fixtures.release import shaken
from unclip.config import UNSAID
from unclip.diffusion.guidance import classifier_free
from unclip.diffusion.samplers import ddim, noise_for
from unclip.errors import Refused
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.text import TokenEncoder
from unclip.presets import TINY
from unclip.release.model import load_model, save_model

B, L, END = 3, TINY.decoder.context, 599
LENGTHS = (4, 9, L)
T = torch.tensor([0, 400, 999])
OWN = replace(TINY.decoder, text="own", vocabulary=END + 1, text_depth=2, text_heads=4)
DECODERS = {"with z_i": OWN, "prompts only": replace(OWN, image=False)}


def sentences(seed: int = 0, padding: int = 0) -> Tensor:
    """Tokens [B, L] as CLIP's tokeniser writes them: start, words, end, padding."""
    tokens = torch.randint(1, END - 1, (B, L), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = END - 1
    for row, length in zip(tokens, LENGTHS, strict=True):
        row[length - 1] = END
        row[length:] = padding
    return tokens


def encoder() -> TokenEncoder:
    made = TokenEncoder(END + 1, L, 32, 2, 4)
    shaken(made, 1)
    return made.eval()


@pytest.fixture(params=DECODERS)
def decoder(request) -> Decoder:
    made = Decoder(DECODERS[request.param])
    shaken(made, 0)
    empty = torch.zeros(L, dtype=torch.long)
    empty[:2] = torch.tensor([END - 1, END])
    made.null_text.set(empty)
    return made.eval()


def image(decoder: Decoder, seed: int = 5) -> Tensor | None:
    """Image embeddings, if this decoder takes them."""
    return torch.randn(B, 32, generator=torch.Generator().manual_seed(seed)) if decoder.config.image else None


def test_the_text_transformer_is_torchs_own_with_the_same_weights():
    ours, tokens = encoder(), sentences()
    layer = nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False).eval()
    names = {
        "norm_1": "norm1", "qkv.": "self_attn.in_proj_", "out.": "self_attn.out_proj.", "norm_2": "norm2",
        "up.": "linear1.", "down.": "linear2.", "blocks": "layers",
    }  # fmt: skip
    state = {}
    for name, tensor in ours.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = tensor
    table, positions = state.pop("embedding.weight"), state.pop("positions")
    theirs.load_state_dict(state)
    padding = torch.arange(L) >= torch.tensor(LENGTHS)[:, None]
    expected = theirs(table[tokens] + positions, src_key_padding_mask=padding)
    pooled, states, mask = ours(tokens)
    assert torch.equal(mask, ~padding)
    torch.testing.assert_close(states[mask], expected[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, expected[torch.arange(B), torch.tensor(LENGTHS) - 1], atol=1e-5, rtol=1e-5)


def test_every_word_sees_every_other_and_none_sees_padding():
    made, tokens = encoder(), sentences()
    changed = tokens.clone()
    changed[:, 1] = changed[:, 1] % 500 + 1
    differ = [(a - b).abs().amax(-1) for a, b in zip(made(tokens)[:2], made(changed)[:2], strict=True)]
    real = made(tokens)[2]
    assert bool((differ[1][real] > 1e-4).all())  # the first word reaches all, before it and behind it
    assert bool((differ[0] > 1e-4).all())


def test_padding_never_changes_a_picture(decoder: Decoder):
    x, z = torch.randn(B, 3, 16, 16), image(decoder)
    drawn = [decoder(x, T, decoder.context(z, sentences(padding=number))) for number in (0, 7)]
    torch.testing.assert_close(*drawn, atol=1e-5, rtol=1e-5)
    other = decoder(x, T, decoder.context(z, sentences(seed=1)))
    assert (drawn[0] - other).abs().flatten(1).amax(1).min() > 1e-3


def test_how_much_padding_there_is_reaches_nothing():
    long, tokens = encoder(), sentences()[:2]  # both end within the first nine
    short = TokenEncoder(END + 1, 9, 32, 2, 4).eval()
    short.load_state_dict(long.state_dict() | {"positions": long.positions[:9]})
    for a, b in zip(short(tokens[:, :9]), long(tokens), strict=True):
        torch.testing.assert_close(a, b[:, :9] if b.ndim > 1 and b.shape[1] == L else b, atol=1e-5, rtol=1e-5)


def test_a_dropped_caption_is_the_empty_one_and_drops_are_per_sample(decoder: Decoder):
    x, z = torch.randn(B, 3, 16, 16), image(decoder)
    some = torch.tensor([True, False, True])
    mixed = decoder(x, T, decoder.context(z, sentences(), drop_text=some))
    kept = decoder(x, T, decoder.context(z, sentences()))
    empty = decoder(x, T, decoder.context(z, *decoder.null_text.expand(B)))
    torch.testing.assert_close(mixed[some], empty[some], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[~some], kept[~some], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(kept[some], empty[some], atol=1e-3)


def test_the_null_context_is_everything_dropped(decoder: Decoder):
    x, everything = torch.randn(B, 3, 16, 16), torch.ones(B, dtype=torch.bool)
    dropped = decoder.context(image(decoder), sentences(), drop_image=everything, drop_text=everything)
    torch.testing.assert_close(decoder(x, T, dropped), decoder(x, T, decoder.null_context(B)), atol=1e-5, rtol=1e-5)


def test_captions_are_read_once_a_sampling_run(decoder: Decoder):
    read: list[int] = []
    decoder.text.register_forward_hook(lambda module, inputs, output: read.append(len(inputs[0])))
    context, null = decoder.context(image(decoder), sentences()), decoder.null_context(B)
    denoise = classifier_free(decoder.denoise, context, null, 2.0)
    noise = noise_for([0, 1, 2], (3, 16, 16), stream="decoder")
    with torch.no_grad():
        ddim(denoise, noise(0), decoder.schedule.respace(6), noise=noise)
    assert read == [B, B]


def test_without_image_embeddings_nothing_is_there_to_read_them():
    decoder = Decoder(DECODERS["prompts only"])
    assert not [name for name in decoder.state_dict() if "image" in name or name in ("mean", "std")]
    with pytest.raises(Refused, match="draws from prompts alone"):
        decoder.context(torch.randn(B, 32), sentences())
    with pytest.raises(Refused, match="draws from an image embedding"):
        Decoder(OWN).context(None, sentences())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": "t5"}, "text 't5' is unknown"),
        ({"text": "own", "text_depth": 1}, "1 blocks .* over 0 tokens"),
        ({"text": "own", "vocabulary": 600}, "0 blocks .* over 600 tokens"),
        ({"vocabulary": 600}, "for text own"),
    ],
)
def test_impossible_texts_are_refused(changes: dict, said: str):
    with pytest.raises(Refused, match=said):
        replace(TINY.decoder, **changes)


def test_a_decoder_made_again_has_the_config_it_had_before_there_were_these_choices(tmp_path: Path):
    save_model(tmp_path / "old", "decoder", TINY.decoder, Decoder(TINY.decoder).state_dict())
    said = json.loads((tmp_path / "old" / "config.json").read_text())["config"]
    new = {item.name for item in fields(DecoderConfig) if item.metadata == UNSAID}
    assert new == {"text", "vocabulary", "image", "inpaint"}
    assert set(said) == {item.name for item in fields(DecoderConfig)} - new


def test_a_decoder_comes_back_from_its_folder(decoder: Decoder, tmp_path: Path):
    save_model(tmp_path / "own", "decoder", decoder.config, decoder.state_dict())
    again = load_model(tmp_path / "own", "decoder")
    assert again.config == decoder.config
    assert again.state_dict().keys() == decoder.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), decoder.state_dict().values(), strict=True)
    )
