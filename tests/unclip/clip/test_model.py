"""The frozen CLIP: equal to open_clip's model, fingerprinted, and suspicious of its folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from unclip.clip.model import Clip, Preprocess, build_clip
from unclip.clip.text import OpenClipText, TextTower
from unclip.clip.vision import foreign_vision_settings, image_tower
from unclip.errors import Refused

MODEL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 2000, "width": 32, "heads": 4, "layers": 2},
}
TEXTS = ["a red circle", "", "two small blue squares on a white background and more than fits into it all"]


def made(seed: int = 0, **changes) -> Clip:
    """A small CLIP with random weights."""
    torch.manual_seed(seed)
    model = deepcopy(MODEL) | changes
    return Clip.of(build_clip(model), model)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return made()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"custom_text": True},
        {"quick_gelu": True},
        {"text_cfg": MODEL["text_cfg"] | {"no_causal_mask": True, "proj_bias": True, "mlp_ratio": 2.0}},
    ],
)
def test_our_text_tower_is_open_clips(changes):
    clip = made(**changes)
    assert isinstance(clip.text, TextTower)
    ours, theirs = clip.encode_text(TEXTS), OpenClipText(clip.model)(clip.tokenize(TEXTS))
    assert torch.allclose(ours.embedding, theirs.embedding, atol=1e-5)
    assert torch.allclose(ours.states, theirs.states, atol=1e-5)
    assert torch.equal(ours.mask, theirs.mask)


def test_an_unusual_text_tower_runs_in_open_clip():
    clip = made(text_cfg=MODEL["text_cfg"] | {"ls_init_value": 0.1})
    assert isinstance(clip.text, OpenClipText)
    text = clip.encode_text(TEXTS)
    assert torch.equal(text.embedding, clip.model.encode_text(clip.tokenize(TEXTS)))
    assert text.states.shape == (3, 16, 32)


def test_the_mask_ends_with_the_end_token(clip):
    text = clip.encode_text(TEXTS)
    assert text.embedding.shape == (3, clip.embedding_width)
    assert text.states.shape == (3, clip.context_length, clip.text_width)
    assert text.mask.sum(1).tolist() == [len(clip.tokenizer.encode("a red circle")) + 2, 2, 16]
    projected = text.states[torch.arange(3), text.mask.sum(1) - 1] @ clip.state["text_projection"]
    assert torch.allclose(projected, text.embedding, atol=1e-6)


def test_what_of_a_prompt_is_cut_is_reported(clip):
    cut = clip.truncated(TEXTS)
    assert cut[:2] == ["", ""]
    assert TEXTS[2].endswith(cut[2])
    assert cut[2]


def test_pictures_go_through_open_clips_image_tower(clip):
    pictures = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    embedding = clip.encode_images(pictures)
    assert embedding.shape == (3, 24)
    assert embedding.dtype == torch.float32
    assert not clip.model.training
    assert not any(p.requires_grad for p in clip.model.parameters())
    assert torch.allclose(clip.encode_images(pictures[:1]), embedding[:1], atol=1e-5)
    assert torch.allclose(clip.encode_images(pictures.float() / 255), embedding, atol=1e-6)


@pytest.mark.parametrize(("size", "resize"), [((48, 40), "shortest"), ((100, 37), "squash"), ((20, 33), "shortest")])
def test_preprocessing_is_open_clips_to_three_grey_levels(size, resize):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    torch.manual_seed(3)
    small = torch.randint(0, 256, (1, 3, size[0] // 4, size[1] // 4)).float()
    picture = torch.nn.functional.interpolate(small, size, mode="bicubic").clamp(0, 255).byte()
    theirs = image_transform_v2(PreprocessCfg(size=32, resize_mode=resize), is_train=False)(
        Image.fromarray(picture[0].permute(1, 2, 0).numpy())
    )
    ours = Preprocess(32, resize=resize)(picture)[0]
    # Pillow rounds to whole grey levels after each of its two passes; ours stays in floats.
    assert (ours - theirs).abs().max() < 3 / 255 / 0.26


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_lower_precision_keeps_directions_and_answers_in_float32(clip, precision):
    pictures = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    low = Clip(clip.config, clip.state, clip.preprocess).to("cpu", precision)
    for ours, exact in (
        (low.encode_images(pictures), clip.encode_images(pictures)),
        (low.encode_text(TEXTS).embedding, clip.encode_text(TEXTS).embedding),
        (low.encode_text(TEXTS).states.flatten(1), clip.encode_text(TEXTS).states.flatten(1)),
    ):
        assert ours.dtype == torch.float32
        assert not torch.equal(ours, exact)
        assert torch.cosine_similarity(ours, exact).min() > 0.999
    assert low.fingerprint == clip.fingerprint


def test_precision_is_taken_back_without_a_trace(clip):
    pictures = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    again = Clip(clip.config, clip.state, clip.preprocess).to("cpu", "bfloat16")
    again.encode_images(pictures)
    again.encode_text(TEXTS)
    again.to("cpu", "float32")
    assert torch.equal(again.encode_images(pictures), clip.encode_images(pictures))
    assert torch.equal(again.encode_text(TEXTS).states, clip.encode_text(TEXTS).states)


def test_what_stands_behind_the_end_token_is_ignored_by_a_causal_tower_alone(clip):
    assert clip.ignores_padding
    ids = clip.tokenize(TEXTS[:2])
    short = clip.encode_tokens(ids[:, :8])
    assert short.states.shape == (2, 8, 32)
    assert torch.allclose(short.embedding, clip.model.encode_text(ids), atol=1e-6)
    assert not made(text_cfg=MODEL["text_cfg"] | {"no_causal_mask": True}).ignores_padding
    assert not made(text_cfg=MODEL["text_cfg"] | {"pool_type": "last"}).ignores_padding


def test_a_saved_clip_comes_back_the_same(clip, tmp_path):
    clip.save(tmp_path)
    again = Clip.load(tmp_path)
    assert again.fingerprint == clip.fingerprint
    assert torch.equal(again.encode_text(TEXTS).states, clip.encode_text(TEXTS).states)
    pictures = torch.randint(0, 256, (2, 3, 40, 32), dtype=torch.uint8)
    assert torch.equal(again.encode_images(pictures), clip.encode_images(pictures))


def test_a_folder_is_the_same_bytes_each_time(clip, tmp_path):
    for name in ("a", "b"):
        clip.save(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["config.json", "merges.txt", "model.safetensors"]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_the_fingerprint_sees_tensors_architecture_tokeniser_and_preprocessing(clip):
    nudged = dict(clip.state) | {"ln_final.bias": clip.state["ln_final.bias"] + 1e-6}
    others = [
        Clip(MODEL, nudged),
        Clip(MODEL | {"quick_gelu": True}, clip.state),
        Clip(MODEL, clip.state, Preprocess(32, mean=(0.5, 0.5, 0.5))),
        Clip(MODEL, clip.state, merges=clip.tokenizer.merges[::-1]),
    ]
    assert len({clip.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert Clip(MODEL, clip.state).fingerprint == clip.fingerprint


def test_altered_or_incomplete_folders_are_refused(clip, tmp_path):
    clip.save(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"ln_final.bias": state["ln_final.bias"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(Refused, match="altered"):
        Clip.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(Refused, match="safetensors"):
        Clip.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(Refused, match="incomplete"):
        Clip.load(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document | {"schema_version": 99}))
    with pytest.raises(Refused, match=r"version 99, and this unclip reads version 1"):
        Clip.load(tmp_path)
    with pytest.raises(Refused, match="does not exist"):
        Clip.load(tmp_path / "nowhere")


def test_models_that_the_adapter_cannot_hold_are_refused():
    for text, reason in (({"hf_model_name": "roberta-base"}, "roberta-base"), ({"embed_cls": True}, "CoCa")):
        with pytest.raises(Refused, match=reason):
            build_clip(MODEL | {"text_cfg": text})
    with pytest.raises(Refused, match="vision_cfg"):
        build_clip({"embed_dim": 8, "text_cfg": {}})
    with pytest.raises(Refused, match="cannot build"):
        build_clip(MODEL | {"vision_cfg": {"no_such_setting": 1}})


def test_unknown_names_tags_and_files_are_refused():
    with pytest.raises(Refused, match="no model 'ViT-X'"):
        Clip.pretrained("ViT-X", "openai")
    with pytest.raises(Refused, match="whose tags are"):
        Clip.pretrained("ViT-B-32", "not-a-tag")


@pytest.mark.slow
def test_a_named_model_is_read_from_a_file_of_weights(tmp_path):
    import open_clip

    module = open_clip.create_model("ViT-S-32-alt").eval()
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    clip = Clip.pretrained("ViT-S-32-alt", str(tmp_path / "weights.pt"))
    picture = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        expected = module.encode_text(open_clip.get_tokenizer("ViT-S-32-alt")(TEXTS))
        seen = module.encode_image(Preprocess(224)(picture))
    assert torch.allclose(clip.encode_text(TEXTS).embedding, expected, atol=1e-5)
    assert torch.allclose(clip.encode_images(picture), seen, atol=1e-5)
    torch.save({"wrong": torch.zeros(1)}, tmp_path / "wrong.pt")
    with pytest.raises(Refused, match="could not load"):
        Clip.pretrained("ViT-S-32-alt", str(tmp_path / "wrong.pt"))


def saved_by_open_clip(folder: Path, preprocess: dict[str, Any]) -> torch.nn.Module:
    """A folder as open_clip pushes it to the hub, and the model in it."""
    torch.manual_seed(3)
    module = build_clip(MODEL).eval()
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": preprocess}))
    save_file(module.state_dict(), folder / "open_clip_model.safetensors")
    return module


def test_a_folder_that_open_clip_saved_is_read_with_its_preprocessing(tmp_path: Path):
    asked = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear", "resize_mode": "squash"}
    module = saved_by_open_clip(tmp_path / "model", asked)
    clip = Clip.pretrained(f"local-dir:{tmp_path / 'model'}")
    assert clip.preprocess == Preprocess(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear", "squash")
    pictures = torch.randint(0, 256, (2, 3, 40, 50), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(clip.encode_images(pictures), module.encode_image(clip.preprocess(pictures)))
        assert torch.allclose(clip.encode_text(TEXTS).embedding, module.encode_text(clip.tokenize(TEXTS)), atol=1e-5)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / "open_clip_model.safetensors").unlink(), "the model's weights are missing"),
        (lambda folder: (folder / "open_clip_config.json").unlink(), "has no open_clip_config.json"),
        (lambda folder: (folder / "open_clip_config.json").write_text("{}"), "has no model_cfg"),
        (lambda folder: (folder / "open_clip_config.json").write_text("["), "cannot be read as JSON"),
        (lambda folder: (folder / "open_clip_model.safetensors").write_bytes(b"no"), "open_clip could not load"),
        (lambda folder: folder.rename(folder.with_name("elsewhere")), "there is no such folder"),
    ],
)
def test_a_folder_of_open_clips_that_is_not_whole_is_refused(tmp_path: Path, harm: Callable[[Path], object], said: str):
    saved_by_open_clip(tmp_path / "model", {})
    harm(tmp_path / "model")
    with pytest.raises(Refused, match=said):
        Clip.pretrained(f"local-dir:{tmp_path / 'model'}")


def test_widths_that_weights_do_not_have_are_refused_before_they_are_built(clip: Clip):
    wide = MODEL | {"text_cfg": MODEL["text_cfg"] | {"width": 2**16, "heads": 64}}
    for tower in ("text", "model"):
        with pytest.raises(Refused, match=r"do not fit this CLIP's configuration: .* is needed"):
            getattr(Clip(wide, clip.state, clip.preprocess), tower)


@pytest.mark.parametrize(
    "wrong",
    [
        {"std": (0.2, 0.0, 0.2)},
        {"std": (1, 1, float("nan"))},
        {"mean": (0.5, 0.5)},
        {"mean": (0, 0, float("inf"))},
        {"size": 0},
        {"size": 224.5},
    ],
)
def test_preprocessing_that_gives_no_numbers_is_refused(wrong: dict[str, Any]):
    with pytest.raises(Refused, match=f"CLIP preprocessing: {next(iter(wrong))} is"):
        Preprocess(**{"size": 224} | wrong)


@pytest.mark.slow
def test_texts_and_pictures_are_encoded_without_importing_open_clip_and_what_it_brings(clip, tmp_path):
    clip.save(tmp_path)
    code = (
        "import sys, torch; from unclip.clip.model import Clip; "
        f"clip = Clip.load({str(tmp_path)!r}); "
        "print(clip.encode_text(['a red circle']).embedding.shape, "
        "clip.encode_images(torch.zeros(1, 3, 32, 32)).shape, "
        "[name for name in ('open_clip', 'torchvision', 'timm', 'transformers', 'torch._dynamo') "
        "if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "torch.Size([1, 24]) torch.Size([1, 24]) []"


VITS = (
    {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "mlp_ratio": 2.0, "patch_dropout": 0.5},
)
RESNETS = (
    {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
    {"layers": [2, 1, 2, 1], "width": 16, "image_size": 64},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("vision", [*VITS, *RESNETS], ids=str)
def test_our_image_towers_are_open_clips_bit_for_bit(vision: dict[str, Any], quick_gelu: bool, dtype: torch.dtype):
    """So an upgrade of open_clip that changes a tower is seen here."""
    import open_clip.model

    config = {**deepcopy(MODEL), "vision_cfg": {"image_size": 32, **vision}, "quick_gelu": quick_gelu}
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(**config).visual
    for name, tensor in (*theirs.named_parameters(), *theirs.named_buffers()):
        if tensor.is_floating_point():  # nothing at its start: a norm of weight 1 would hide much
            tensor.data += (
                (0.1 * torch.randn_like(tensor)).abs() if "running" in name else 0.05 * torch.randn_like(tensor)
            )
    assert foreign_vision_settings(config) == []
    ours = image_tower(config)
    ours.load_state_dict(theirs.state_dict())
    side = config["vision_cfg"]["image_size"]
    towers = [tower.requires_grad_(False).eval().to(dtype) for tower in (theirs, ours)]
    for count in (1, 5, 16):
        pixels = torch.randn(count, 3, side, side).to(dtype)
        with torch.no_grad():
            a, b = (tower(pixels) for tower in towers)
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "vision",
    [
        {"pool_type": "avg"},
        {"no_ln_pre": True},
        {"ls_init_value": 1e-5},
        {"attentional_pool": True},
        {"pos_embed_type": "sin_cos_2d"},
    ],
    ids=str,
)
def test_an_unusual_image_tower_runs_in_open_clip(vision: dict[str, Any]):
    config = {**deepcopy(MODEL), "vision_cfg": {"image_size": 32, **VITS[0], **vision}}
    assert foreign_vision_settings(config) == [*vision]
    clip = Clip.of(build_clip(config), config)
    assert type(clip.images).__module__ == "open_clip.transformer"
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(clip.encode_pixels(pixels), clip.model.encode_image(pixels))


def test_a_tower_of_timms_is_built_by_the_whole_package():
    vision = {"timm_model_name": "resnet10t", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
    module = build_clip({**deepcopy(MODEL), "vision_cfg": vision})
    assert type(module).__module__ == "open_clip.model"
    assert type(module.visual).__name__ == "TimmModel"
