"""Releases as diffusers folders and back, against diffusers' and transformers' own models and pipelines."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fixtures.beside_diffusers import PROMPTS, SCALES, SEEDS, STEPS, Fed, drawn, exact, far, pipeline, theirs
from tests.fixtures.plain import VIT, ours, saved, shaken
from tests.fixtures.release import MODEL
from unclip.cascade import UnCLIP
from unclip.clip.model import Clip, build_clip
from unclip.diffusion.guidance import clip_x0
from unclip.diffusion.settings import Sampling
from unclip.errors import Refused
from unclip.interop.diffusers import INDEX, export_diffusers, import_diffusers
from unclip.models.decoder import Decoder
from unclip.models.prior import DiffusionPrior
from unclip.models.upsampler import Upsampler
from unclip.presets import TINY


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[UnCLIP, Path, Any]:
    folder = tmp_path_factory.mktemp("interop")
    told = export_diffusers(saved(ours(), folder), folder / "diffusers")
    assert (told.size, told.left_out) == (32, ("upsampler-64",))
    return UnCLIP.load(folder / "release"), folder / "diffusers", pipeline(folder / "diffusers")


def states(model: UnCLIP) -> tuple[Any, Tensor, Tensor, Tensor]:
    text = model.clip.encode_text(PROMPTS)
    generator = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 32, generator=generator), torch.tensor([37, 960])
    return text, z, t, generator


def test_the_text_encoder_and_tokeniser_see_texts_as_our_clip_does(exported):
    model, _, pipe = exported
    prompts = [*PROMPTS, "", "Naïve café, 42 CATS!", "word " * 40]
    text = model.clip.encode_text(prompts)
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = pipe.text_encoder(tokens.input_ids)
    assert torch.equal(tokens.attention_mask.bool(), text.mask)
    assert far(out.text_embeds, text.embedding) < 1e-4
    assert far(out.last_hidden_state[text.mask], text.states[text.mask]) < 1e-4


def test_the_image_encoder_and_processor_see_pictures_as_our_clip_does(exported):
    model, folder, _ = exported
    pipe = pipeline(folder, "UnCLIPImageVariationPipeline")
    pictures = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = pipe.feature_extractor(images=list(pictures), return_tensors="pt").pixel_values
    assert far(pixels, model.clip.preprocess(pictures)) < 1e-5
    with torch.no_grad():
        assert far(pipe.image_encoder(pixels).image_embeds, model.clip.encode_images(pictures)) < 1e-4


def test_the_prior_and_its_statistics_are_theirs(exported):
    model, _, pipe = exported
    text, z, t, _ = states(model)
    with torch.no_grad():
        out = pipe.prior(z, t, text.embedding, text.states, text.mask).predicted_image_embedding
        assert far(out, model.prior(z, t, *text)) < 1e-4
        assert far(pipe.prior.post_process_latents(z), model.prior.destandardise(z)) < 1e-6


def test_the_decoder_with_its_projections_is_theirs(exported):
    model, _, pipe = exported
    text, z, t, generator = states(model)
    x = torch.randn(2, 3, 16, 16, generator=generator)
    with torch.no_grad():
        tokens, addend = pipe.text_proj(
            image_embeddings=z,
            prompt_embeds=text.embedding,
            text_encoder_hidden_states=text.states,
            do_classifier_free_guidance=False,
        )
        context = model.decoder.context(z, *text)
        assert far(addend, context.addend) < 1e-4
        out = pipe.decoder(x, t, tokens, class_labels=addend, attention_mask=context.mask).sample
        assert far(out, model.decoder(x, t, context)) < 1e-4


def test_the_upsampler_is_theirs(exported):
    model, _, pipe = exported
    _, _, t, generator = states(model)
    x, low = torch.randn(2, 3, 32, 32, generator=generator), torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    high = nn.functional.interpolate(low, size=[32, 32], mode="bicubic", align_corners=False, antialias=True)
    with torch.no_grad():
        for unet in (pipe.super_res_first, pipe.super_res_last):
            assert far(unet(torch.cat([x, high], 1), t).sample, model.upsamplers[0](x, t, low)) < 1e-4


@pytest.mark.parametrize("scales", [SCALES, {"prior": 1.0, "decoder": 1.0}], ids=["guided", "unguided"])
def test_an_exported_release_draws_the_same_pictures_from_the_same_noise(exported, monkeypatch, scales):
    model, folder, _ = exported
    pipe = pipeline(folder)
    exact(pipe)
    assert far(theirs(pipe, monkeypatch, scales), drawn(model, scales)) < 1e-4


def test_untouched_diffusers_draws_the_same_pictures_where_rounding_stays_small(tmp_path, monkeypatch):
    # x0-prediction does not divide by an α_T near 0, 50 timesteps do not begin at a β near 0, and a network of halved
    # weights does not blow a difference up: what is left is within 1e-4 without a change to diffusers' tables.
    model = ours()
    for part in (model.prior, model.decoder, model.upsamplers[0]):
        part.config = replace(part.config, timesteps=50, prediction="x0")
        for name, parameter in part.named_parameters():
            parameter.mul_(1.0 if "norm" in name else 0.5)
    export_diffusers(model, tmp_path / "diffusers")
    pictures = drawn(model, SCALES)
    assert far(theirs(pipeline(tmp_path / "diffusers"), monkeypatch, SCALES), pictures) < 1e-4
    other = drawn(model, {"prior": 1.0, "decoder": 1.0})
    assert (pictures - other).abs().max() > 1e-2


def test_a_step_of_the_exported_scheduler_is_our_ddpm_step_but_for_float32_at_the_last(exported, monkeypatch):
    model, folder, _ = exported
    pipe = pipeline(folder)
    shipped = copy.deepcopy(pipe.decoder_scheduler)
    exact(pipe)
    scheduler = pipe.decoder_scheduler
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 3, 16, 16, generator=generator), torch.randn(2, 6, 16, 16, generator=generator)
    fed = Fed(monkeypatch, {"decoder": (2, (3, 16, 16))})
    due = list(fed.due)
    steps = 6
    scheduler.set_timesteps(steps)
    schedule = model.decoder.schedule.respace(steps)
    assert scheduler.timesteps.tolist() == schedule.timesteps.flip(0).tolist()
    # Not the noisiest: its α is 5e-5, by which both divide what rounding left of x − σε.
    for k, t in list(enumerate(scheduler.timesteps[:-1]))[1:]:
        fed.due = list(due)
        next_x = scheduler.step(output, t, x, prev_timestep=scheduler.timesteps[k + 1]).prev_sample
        index = torch.full((2,), steps - 1 - k)
        prediction = clip_x0(lambda x, t: model.decoder.predict(output, x, t), model.decoder.schedule)(x, t.expand(2))
        log_variance = schedule.log_variance(index, x, prediction.fraction)
        mean = schedule.posterior_mean(prediction.x0, x, index)
        assert far(next_x, mean + (0.5 * log_variance).exp() * fed.noises["decoder"](1)) < 2e-5
    # The last step returns x0; by the formula the factor before it is β_0/(1 − ᾱ_0) = 1.
    last = shipped.step(output, torch.tensor(0), x).prev_sample
    x0 = clip_x0(lambda x, t: model.decoder.predict(output, x, t), model.decoder.schedule)(x, torch.zeros(2).long()).x0
    assert far(last, float(shipped.betas[0] / (1 - shipped.alphas_cumprod[0])) * x0) < 1e-5
    assert 4e-4 < far(last, x0) < 7e-4


def test_variations_of_a_picture_are_the_same_pictures(exported, monkeypatch):
    model, folder, _ = exported
    pipe = pipeline(folder, "UnCLIPImageVariationPipeline")
    exact(pipe)
    shapes = {"decoder": (STEPS["decoder"], (3, 16, 16)), "upsampler-32": (STEPS["upsampler"], (3, 32, 32))}
    fed = Fed(monkeypatch, shapes)
    embedding = model.clip.encode_images(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    pictures = pipe(
        image_embeddings=embedding,
        decoder_num_inference_steps=STEPS["decoder"],
        super_res_num_inference_steps=STEPS["upsampler"],
        decoder_latents=fed.first("decoder"),
        super_res_latents=fed.first("upsampler-32"),
        decoder_guidance_scale=2.0,
        output_type="np",
    ).images
    x = model.sample_decoder(
        embedding, model.clip.encode_text(["", ""]), SEEDS, Sampling("ddpm", STEPS["decoder"], guidance=2.0)
    )
    x = model.sample_upsampler(model.upsamplers[0], x, SEEDS, Sampling("ddpm", STEPS["upsampler"]))
    assert far(torch.from_numpy(pictures).permute(0, 3, 1, 2), (x * 0.5 + 0.5).clamp(0, 1)) < 1e-4


@pytest.fixture(scope="module")
def karlo(tmp_path_factory) -> Path:
    """A folder in Karlo's layout, written by diffusers: random weights, two different super-resolution networks."""
    from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
    from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = Clip.of(build_clip(VIT), VIT).tokenizer
    vocabulary = {piece: number for piece, number in tokenizer.ids.items() if number < 1998}
    vocabulary |= {"<|startoftext|>": 1998, "<|endoftext|>": 1999}
    text = CLIPTextConfig(
        vocab_size=2000, hidden_size=32, intermediate_size=96, projection_dim=32, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=24, bos_token_id=1998, eos_token_id=1999,
    )  # fmt: skip
    widths = {"block_out_channels": (16, 32), "layers_per_block": 2, "norm_num_groups": 8}
    resnets = {"down_block_types": ("ResnetDownsampleBlock2D",) * 2, "up_block_types": ("ResnetUpsampleBlock2D",) * 2}
    super_res = {"in_channels": 6, "out_channels": 3, "add_attention": False, **resnets, **widths}
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=32, num_embeddings=24
    )
    decoder = UNet2DConditionModel(
        sample_size=16, in_channels=3, out_channels=6, cross_attention_dim=48, attention_head_dim=16,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift",
        class_embed_type="identity", **widths,
    )  # fmt: skip
    pipe = UnCLIPPipeline(
        prior=shaken(prior, 11),
        decoder=shaken(decoder, 12),
        text_encoder=shaken(CLIPTextModelWithProjection(text), 13),
        tokenizer=CLIPTokenizer(
            vocab=vocabulary, merges=[tuple(merge.split()) for merge in tokenizer.merges], model_max_length=24
        ),
        text_proj=shaken(UnCLIPTextProjModel(clip_embeddings_dim=32, time_embed_dim=64, cross_attention_dim=48), 14),
        super_res_first=shaken(UNet2DModel(sample_size=32, **super_res), 15),
        super_res_last=shaken(UNet2DModel(sample_size=32, **super_res), 16),
        prior_scheduler=UnCLIPScheduler(prediction_type="sample", clip_sample_range=1.5),
        decoder_scheduler=UnCLIPScheduler(variance_type="learned_range"),
        super_res_scheduler=UnCLIPScheduler(),
    )
    folder = tmp_path_factory.mktemp("karlo")
    pipe.save_pretrained(folder)
    return folder


def loadable(folder: Path, target: Path) -> Path:
    """diffusers 0.42 cannot load what it wrote: it looks for text_proj's class where it no longer is."""
    shutil.copytree(folder, target)
    index = json.loads((target / INDEX).read_text())
    index["text_proj"][0] = "diffusers.pipelines.deprecated.unclip.text_proj"
    (target / INDEX).write_text(json.dumps(index))
    return target


@pytest.mark.slow
def test_an_imported_folder_draws_the_same_pictures_from_the_same_noise(karlo, tmp_path, monkeypatch):
    made = import_diffusers(karlo, tmp_path / "release", name="karlo")
    assert (made.name, made.upsamplers) == ("karlo", ["upsampler-32"])
    model = UnCLIP.load(tmp_path / "release")
    assert model.upsamplers[0].last is not None
    assert model.prior.config.clip_range == 1.5
    assert model.sampling["decoder"] == Sampling("ddpm", 25, guidance=8.0)
    pipe = pipeline(loadable(karlo, tmp_path / "copy"))
    exact(pipe)
    assert far(theirs(pipe, monkeypatch, SCALES), drawn(model, SCALES)) < 1e-4


def test_a_folder_without_an_image_tower_reads_texts_only(karlo, exported, tmp_path):
    import_diffusers(karlo, tmp_path / "release")
    with pytest.raises(Refused, match="no image tower"):
        UnCLIP.load(tmp_path / "release").clip.encode_images(torch.zeros(1, 3, 32, 32))
    images = shutil.copytree(exported[1], tmp_path / "images")
    with pytest.raises(Refused, match="different activations"):
        import_diffusers(karlo, tmp_path / "both", images=images)
    change(images / "image_encoder/config.json", hidden_act="quick_gelu")
    import_diffusers(karlo, tmp_path / "both", images=images)
    clip = UnCLIP.load(tmp_path / "both").clip
    assert clip.encode_images(torch.rand(1, 3, 32, 32)).shape == (1, 32)


def test_export_and_import_give_the_same_models_back(exported, tmp_path):
    model, folder, _ = exported
    import_diffusers(folder, tmp_path / "release")
    back = UnCLIP.load(tmp_path / "release")
    assert back.upsamplers[0].config == model.upsamplers[0].config
    assert back.decoder.config == model.decoder.config
    assert back.prior.config == model.prior.config
    assert back.clip.preprocess == model.clip.preprocess
    for name, tensor in model.prior.state_dict().items():
        assert torch.equal(back.prior.state_dict()[name], tensor), name
    for name, tensor in model.upsamplers[0].state_dict().items():
        assert torch.equal(back.upsamplers[0].state_dict()[name], tensor), name
    assert far(drawn(back, SCALES), drawn(model, SCALES)) < 1e-4
    pictures = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.allclose(back.clip.encode_images(pictures), model.clip.encode_images(pictures), atol=1e-6)


def test_a_second_network_for_the_last_step_survives_the_way_there_and_back(tmp_path):
    model = ours(upsampler={"last": True, "scale_shift": False, "time_multiple": 2, "learned_range": True})
    export_diffusers(model, tmp_path / "diffusers")
    first, last = (tmp_path / "diffusers" / part for part in ("super_res_first", "super_res_last"))
    assert (first / "diffusion_pytorch_model.safetensors").read_bytes() != (
        last / "diffusion_pytorch_model.safetensors"
    ).read_bytes()
    import_diffusers(tmp_path / "diffusers", tmp_path / "release")
    back = UnCLIP.load(tmp_path / "release").upsamplers[0]
    assert back.config == model.upsamplers[0].config
    for name, tensor in model.upsamplers[0].state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_the_last_network_takes_timestep_0_and_no_other():
    upsampler = shaken(Upsampler(replace(TINY.upsamplers[0], last=True)), 0).eval()
    other = shaken(Upsampler(replace(TINY.upsamplers[0], last=True)), 0).eval()
    for parameter in other.last.parameters():
        nn.init.normal_(parameter)
    x, low, t = torch.randn(3, 3, 32, 32), torch.randn(3, 3, 16, 16), torch.tensor([0, 1, 999])
    with torch.no_grad():
        mixed, changed = upsampler(x, t, low), other(x, t, low)
        alone = torch.cat([upsampler(x[i : i + 1], t[i : i + 1], low[i : i + 1]) for i in range(3)])
    assert torch.allclose(mixed, alone, atol=1e-4)
    assert torch.equal(mixed[1:], changed[1:])
    assert not torch.allclose(mixed[0], changed[0], atol=1e-2)


def cannot_hold() -> Iterator[tuple[str, Any, str]]:
    def decoder(**change: Any) -> Any:
        return lambda: ours(decoder=Decoder(replace(TINY.decoder, **change)))

    yield "unshuffled", decoder(unshuffle=2, attention=(4,)), "unshuffle"
    yield "positioned", decoder(position=True), "learned maps"
    yield "text blocks", decoder(text_depth=1, text_heads=2), "text transformer of 1 blocks"
    yield "fixed variance", decoder(learned_range=False), "six"
    yield "v", decoder(prediction="v"), "predicts v"
    yield "unattended", decoder(attention=(16,)), "lowest level, 8 px"
    yield "linear", lambda: ours(upsampler={"schedule": "linear"}), "linear"
    yield "other cubic", lambda: ours(upsampler={"antialias": False}), "cubic"
    yield "no upsampler", lambda: ours(upsamplers=[]), "no upsampler"
    yield "null text", lambda: ours(prior=DiffusionPrior(TINY.prior)), "prior's null text"
    yield "ResNet", lambda: ours(clip=Clip.of(build_clip(MODEL), MODEL)), "ResNet"


@pytest.mark.parametrize(
    ("make", "reason"), [(m, r) for _, m, r in cannot_hold()], ids=[n for n, _, _ in cannot_hold()]
)
def test_what_diffusers_cannot_hold_is_refused_with_the_reason(make, reason, tmp_path):
    with pytest.raises(Refused, match=reason):
        export_diffusers(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def pickled(folder: Path) -> None:
    torch.save({}, folder / "decoder/diffusion_pytorch_model.bin")
    (folder / "decoder/diffusion_pytorch_model.safetensors").unlink()


def sharded(folder: Path) -> None:
    """An index of shards whose names cannot be put in order."""
    weights = folder / "prior/diffusion_pytorch_model.safetensors"
    weights.with_suffix(".safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "a", "b": 5}}))
    weights.unlink()


def weights(part: str, name: str, harm: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Another tensor in the place of one of a component's."""
    from safetensors.torch import load_file, save_file

    def done(folder: Path) -> None:
        (path,) = (folder / part).glob("*.safetensors")
        state = load_file(path)
        save_file(state | {name: harm(state[name])}, path)

    return done


DECODER_SCHEDULER = "decoder_scheduler/scheduler_config.json"
BAD = {
    "no index": (lambda f: (f / INDEX).unlink(), "does not exist"),
    "no weights": (lambda f: (f / "prior/diffusion_pytorch_model.safetensors").unlink(), "incomplete"),
    "no config": (lambda f: (f / "text_proj/config.json").unlink(), "does not exist"),
    "broken json": (lambda f: (f / INDEX).write_text("{"), "JSON"),
    "another pipeline": (lambda f: change(f / INDEX, _class_name="UnCLIPImageVariationPipeline"), "prior"),
    "another class": (lambda f: change(f / INDEX, prior=["diffusers", "UNet2DModel"]), "PriorTransformer"),
    "another scheduler": (lambda f: change(f / INDEX, prior_scheduler=["diffusers", "DDIM"]), "UnCLIPScheduler"),
    "a width": (lambda f: change(f / "prior/config.json", embedding_dim=48), "embedding 48"),
    "a shape": (lambda f: change(f / "prior/config.json", attention_head_dim=8), "shape"),
    "a depth": (lambda f: change(f / "prior/config.json", num_layers=1), "does not account for"),
    "deeper": (lambda f: change(f / "prior/config.json", num_layers=3), "no tensor"),
    "a context": (lambda f: change(f / "tokenizer/tokenizer_config.json", model_max_length=77), "24 positions"),
    "an option": (lambda f: change(f / "decoder/config.json", act_fn="gelu"), "act_fn"),
    "an unknown option": (lambda f: change(f / "decoder/config.json", warp=True), "warp"),
    "no number": (lambda f: change(f / "decoder/config.json", layers_per_block=[1, 2]), "layers_per_block"),
    "a text projection": (lambda f: change(f / "text_proj/config.json", time_embed_dim=32), "time_embed_dim"),
    "clipping": (lambda f: change(f / DECODER_SCHEDULER, clip_sample=False), "clips x0"),
    "variances": (lambda f: change(f / DECODER_SCHEDULER, variance_type="fixed_small_log"), "variance"),
    "two shapes": (lambda f: change(f / "super_res_last/config.json", layers_per_block=1), "different shapes"),
    "an activation": (lambda f: change(f / "text_encoder/config.json", hidden_act="relu"), "activation"),
    "a hidden size": (lambda f: change(f / "text_encoder/config.json", hidden_size=1.5), "hidden_size = 1.5"),
    "a dropout": (lambda f: change(f / "prior/config.json", dropout="a"), "understands"),
    "shards": (sharded, "understands|outside its folder|does not exist"),
    "nested": (lambda f: (f / INDEX).write_text("[" * 100_000), "nested too deeply"),
    "a pickle": (pickled, "pickle"),
    "NaN": (weights("prior", "proj_in.bias", lambda t: t * torch.nan), "not finite"),
    "integers": (weights("prior", "proj_in.bias", torch.Tensor.long), "holds torch.int64 in proj_in.bias"),
    "imaginary": (weights("decoder", "conv_in.bias", lambda t: t.to(torch.complex64)), "torch.complex64 in conv_in"),
    "imaginary texts": (
        weights("text_encoder", "text_projection.weight", lambda t: t.to(torch.complex64)), "holds torch.complex64"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_folder_that_is_no_unclip_of_ours_is_refused(case, karlo, tmp_path):
    harm, reason = BAD[case]
    shutil.copytree(karlo, tmp_path / "folder")
    harm(tmp_path / "folder")
    with pytest.raises(Refused, match=reason):
        import_diffusers(tmp_path / "folder", tmp_path / "release")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("std", [[0.2, 0.0, 0.2], [0.2, 0.2], "a"])
def test_preprocessing_that_divides_by_nothing_is_refused(karlo, exported, tmp_path, std):
    shutil.copytree(exported[1], tmp_path / "images")
    change(tmp_path / "images/image_encoder/config.json", hidden_act="quick_gelu")
    change(tmp_path / "images/feature_extractor/preprocessor_config.json", image_std=std)
    with pytest.raises(Refused, match="CLIP preprocessing: std is"):
        import_diffusers(karlo, tmp_path / "release", images=tmp_path / "images")


def test_nothing_is_written_over(exported, karlo, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(Refused, match="not empty"):
        export_diffusers(exported[0], tmp_path)
    with pytest.raises(Refused, match="not empty"):
        import_diffusers(karlo, tmp_path)
