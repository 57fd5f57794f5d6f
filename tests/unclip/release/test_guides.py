"""A classifier and a noised CLIP: the encoder against torch's and the paper's, their guidance against exact Bayes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fixtures.release import SAMPLING, shaken, write_parts
from unclip import manipulate
from unclip.cascade import UnCLIP
from unclip.diffusion.guidance import classifier_guidance, clip_guidance, clip_x0
from unclip.diffusion.samplers import ddim
from unclip.diffusion.schedule import Denoiser, Prediction, Schedule
from unclip.errors import Refused
from unclip.models.classifier import Classifier, ClassifierConfig
from unclip.models.noised_clip import NoisedClip, NoisedClipConfig
from unclip.models.unet_encoder import AttentionPool, HalfUNet, HalfUNetConfig, SelfAttention
from unclip.presets import ADM_CLASSIFIER, TINY
from unclip.release.folder import save_release
from unclip.release.model import save_model

CLASSES = (("circle", "square"), ("red", "green", "blue"))


def small(**changes) -> dict:
    """The tiny preset's encoder as plain fields."""
    assert TINY.encoder is not None
    return {**vars(TINY.encoder), **changes}


# The encoder ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "multiples", "depth", "published"),
    [(64, (1, 2, 3, 4), 4, 65), (128, (1, 1, 2, 3, 4), 2, 43), (256, (1, 1, 2, 2, 4, 4), 2, 54)],
)
def test_adms_classifiers_have_the_published_sizes(size, multiples, depth, published):
    """Dhariwal & Nichol 2021, table 12: millions of parameters with ImageNet's 1000 classes."""
    config = replace(ADM_CLASSIFIER, size=size, multiples=multiples, depth=depth)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in HalfUNet(config, 1000).parameters())
    assert round(count / 1e6) == published


def torchs_attention(query: nn.Linear | None, rest: nn.Linear, heads: int) -> nn.MultiheadAttention:
    """torch's own attention with those projections, and none behind it."""
    width = rest.in_features
    theirs = nn.MultiheadAttention(width, heads, batch_first=True)
    parts = [rest] if query is None else [query, rest]
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        theirs.out_proj.weight.copy_(torch.eye(width))
        theirs.out_proj.bias.zero_()
    return theirs


def test_pooling_is_torchs_attention_of_the_mean_to_all_pixels():
    pool = shaken(AttentionPool(4, 16, 8, 5), 0)
    x = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    pixels = x.flatten(2).mT
    tokens = torch.cat([pixels.mean(1, keepdim=True), pixels], 1) + pool.positions
    attended, _ = torchs_attention(pool.query, pool.keys_values, 2)(tokens[:, :1], tokens, tokens)
    torch.testing.assert_close(pool(x), pool.out(attended[:, 0]))


def test_attention_between_pixels_is_torchs_with_a_shortcut():
    attention = shaken(SelfAttention(16, 8, 4), 0)
    x = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    tokens = attention.norm(x).flatten(2).mT
    attended, _ = torchs_attention(None, attention.qkv, 2)(tokens, tokens, tokens)
    torch.testing.assert_close(attention(x), x + attention.out(attended).mT.reshape(x.shape))


def test_every_level_and_the_timestep_reach_the_outputs():
    encoder = shaken(HalfUNet(HalfUNetConfig(**small()), 3), 0)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    encoder(x, torch.tensor([10, 900])).square().sum().backward()
    assert not [name for name, parameter in encoder.named_parameters() if not parameter.grad.abs().max() > 0]
    early, late = encoder(x, torch.tensor([10, 10])), encoder(x, torch.tensor([900, 900]))
    assert not torch.allclose(early, late)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention": (5,)}, "attention at 5 px"),
        ({"head_channels": 12, "attention": ()}, "do not divide into heads of 12"),
        ({"size": 15}, "cannot halve pictures of 15 px"),
        ({"schedule": "sigmoid"}, "sigmoid"),
        ({"labels": ("a", "a")}, "stands twice"),
        ({"labels": ("a",), "classes": (("x",),)}, "two classes or more"),
        ({"labels": ("a",), "classes": (("x", "y"), ("z", "w"))}, "1 labels with 2 tables"),
    ],
)
def test_impossible_encoders_are_refused(changes, reason):
    with pytest.raises(Refused, match=reason):
        ClassifierConfig(**small(**changes))


# Guidance on data whose posteriors are known -------------------------------------------------------------------------


class Bars:
    """Pictures 8 × 8 with one bar of 6 × 2 pixels, lying or standing, wherever it fits: a finite world.

    With finitely many pictures x_k, all that is learned elsewhere is known: p(k | x_t) ∝ exp(−‖x_t − α·x_k‖² / 2σ²).
    """

    schedule = Schedule.named("cosine")

    def __init__(self) -> None:
        pictures = []
        for height, width in ((2, 6), (6, 2)):
            for row in range(9 - height):
                for column in range(9 - width):
                    picture = -torch.ones(3, 8, 8)
                    picture[:, row : row + height, column : column + width] = 1
                    pictures.append(picture)
        self.pictures = torch.stack(pictures)
        self.standing = torch.arange(len(pictures)) >= len(pictures) // 2

    def weights(self, x: Tensor, t: Tensor) -> Tensor:
        """p(k | x_t), [b, pictures]."""
        alpha, sigma = (self.schedule.at(name, t, x).view(-1, 1) for name in ("alpha", "sigma"))
        far = (x.flatten(1)[:, None] - alpha[:, None] * self.pictures.flatten(1)[None]).square().sum(2)
        return (-far / (2 * sigma**2)).softmax(1)

    def denoise(self, x: Tensor, t: Tensor) -> Prediction:
        """The optimal denoiser."""
        return self.schedule.predict("x0", torch.einsum("bk,kchw->bchw", self.weights(x, t), self.pictures), x, t)

    def drawn(self, count: int, seed: int, most: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, t, whether the bar stands) of random pictures at random timesteps below `most`."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(self.pictures), (count,), generator=generator)
        t = torch.randint(most, (count,), generator=generator)
        noise = torch.randn(count, 3, 8, 8, generator=generator)
        return self.schedule.q_sample(self.pictures[chosen], noise, t), t, self.standing[chosen].long()

    def share_standing(self, denoise: Denoiser) -> float:
        """Share of 64 samples whose nearest picture has a standing bar, from the same noise always."""
        x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            made = ddim(clip_x0(denoise, self.schedule), x, self.schedule.respace(25), noise=lambda _: x)
        nearest = (made.flatten(1)[:, None] - self.pictures.flatten(1)[None]).square().sum(2).argmin(1)
        return float(self.standing[nearest].float().mean())


BARS = Bars()
ENCODER = HalfUNetConfig(
    size=8, channels=16, multiples=(1, 2), depth=1, attention=(), head_channels=16, groups=4
)  # fmt: skip


def learned(model: nn.Module, loss, steps: int = 150) -> nn.Module:
    """The model after so many steps of AdamW on batches of 64, at a falling rate."""
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, steps)
    for step in range(steps):
        optimiser.zero_grad()
        loss(*BARS.drawn(64, step)).backward()
        optimiser.step()
        decay.step()
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def told_apart() -> Classifier:
    """A classifier of lying and standing bars at all noise levels."""
    torch.manual_seed(0)
    model = Classifier(ClassifierConfig(**vars(ENCODER), labels=("bar",), classes=(("lying", "standing"),)))
    return learned(model, lambda x, t, right: F.cross_entropy(model(x, t)[0], right))


@pytest.mark.slow
def test_a_classifier_learns_the_true_posterior(told_apart: Classifier):
    x, t, right = BARS.drawn(1024, 10**6, most=300)
    assert float((told_apart(x, t)[0].argmax(1) == right).float().mean()) > 0.95  # chance is 0.5
    x, t, right = BARS.drawn(1024, 10**6 + 1)
    true = torch.stack([BARS.weights(x, t)[:, BARS.standing == bar].sum(1) for bar in (False, True)], 1)
    bayes = F.nll_loss(true.clamp(min=1e-6).log(), right)
    assert float(F.cross_entropy(told_apart(x, t)[0], right)) < float(bayes) + 0.05


@pytest.mark.slow
def test_classifier_guidance_makes_the_wanted_class(told_apart: Classifier):
    """From the same noise: p(x) at s = 0 and, where both networks are right, p(x | standing) at s = 1."""

    def share(scale: float, wanted: str = "standing") -> float:
        log_prob = told_apart.log_prob({"bar": wanted})
        return BARS.share_standing(classifier_guidance(BARS.denoise, log_prob, scale, BARS.schedule))

    assert 0.3 < share(0) < 0.7
    assert share(0) == BARS.share_standing(BARS.denoise)
    assert share(1) > 0.85
    assert share(3) > 0.95
    assert share(3, "lying") < 0.05


@pytest.mark.slow
def test_clip_guidance_makes_what_the_text_says():
    """A noised CLIP that learned two captions; the caption's embedding then decides between them."""
    texts = F.normalize(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    torch.manual_seed(0)
    model = NoisedClip(NoisedClipConfig(**vars(ENCODER), embedding=8))

    def loss(x: Tensor, t: Tensor, right: Tensor) -> Tensor:
        return F.cross_entropy(model.scale * F.normalize(model(x, t), dim=1) @ texts.T, right)

    learned(model, loss)

    def share(caption: int) -> float:
        scale = 3 * float(model.scale)
        return BARS.share_standing(clip_guidance(BARS.denoise, model, texts[[caption] * 64], scale, BARS.schedule))

    assert share(0) < 0.25 < 0.75 < share(1)


def test_log_probabilities_of_several_labels_add_up():
    model = shaken(Classifier(ClassifierConfig(**small(labels=("shape", "colour"), classes=CLASSES))), 0)
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 500])
    shape, colour = (logits.log_softmax(1) for logits in model(x, t))
    found = model.log_prob({"colour": "blue", "shape": "circle"})(x, t)
    torch.testing.assert_close(found, shape[:, 0] + colour[:, 2])
    total = sum(model.log_prob({"shape": s, "colour": c})(x, t).exp() for s in CLASSES[0] for c in CLASSES[1])
    torch.testing.assert_close(total, torch.ones(2))


# In a release --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The parts of the tiny release, and both guides with random weights."""
    folder = tmp_path_factory.mktemp("parts")
    made = write_parts(folder)
    fingerprint = json.loads((made["clip"] / "config.json").read_text())["fingerprint"]
    labelled = ClassifierConfig(**small(labels=("shape", "colour"), classes=CLASSES))
    save_model(folder / "classifier", "classifier", labelled, shaken(Classifier(labelled), 7).state_dict())
    config = NoisedClipConfig(**small(embedding=32))
    state = shaken(NoisedClip(config), 8).state_dict()
    save_model(folder / "noised-clip", "noised_clip", config, state, clip=fingerprint)
    return made | {name: folder / name for name in ("classifier", "noised-clip")}


@pytest.fixture(scope="module")
def model(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> UnCLIP:
    folder = tmp_path_factory.mktemp("guided") / "release"
    save_release(folder, "tiny", parts, SAMPLING)
    return UnCLIP.load(folder)


def test_a_release_carries_its_guides(model: UnCLIP):
    assert list(model.guides.models) == ["classifier", "noised-clip"]
    assert model.guides.classifier is not None
    assert model.guides.classifier.config.classes == CLASSES
    assert set(model.sampling) == set(SAMPLING)


def test_a_label_and_a_text_change_the_picture_and_a_scale_of_0_does_not(model: UnCLIP):
    def draw(**how) -> Tensor:  # random networks have small gradients, hence the large scales
        return model.generate(["a red circle"], seeds=[3], **how)

    plain, wanted = draw(), {"shape": "circle"}
    assert torch.equal(plain, draw(labels=wanted, label_guidance=0.0))
    assert torch.equal(plain, draw(clip_guidance=0.0))
    guided = [draw(labels=wanted, label_guidance=1e4), draw(labels={"shape": "square"}, label_guidance=1e4)]
    guided.append(draw(clip_guidance=1e4))
    for one, other in ((guided[0], plain), (guided[0], guided[1]), (guided[2], plain)):
        assert not torch.equal(one, other)
    decoder = replace(model.sampling["decoder"], labels=wanted, label_guidance=1e4)
    assert torch.equal(guided[0], draw(sampling={"decoder": decoder}))


def test_guided_pictures_do_not_depend_on_their_neighbours(model: UnCLIP):
    how = {"labels": {"colour": "red"}, "clip_guidance": 1e4, "label_guidance": 1e4}
    prompts = [f"a {word} circle" for word in ("red", "green", "blue", "white", "black")]
    together = model.generate(prompts, seeds=[1, 2, 3, 4, 5], **how)
    assert torch.equal(together[4:], model.generate(prompts[4:], seeds=[5], **how))


def test_where_no_caption_is_told_none_guides(model: UnCLIP):
    decoder = replace(model.sampling["decoder"], clip_guidance=1e4, labels={"shape": "circle"}, label_guidance=1e4)
    settings = model.sampling | {"decoder": decoder}
    guided = UnCLIP(model.clip, model.prior, model.decoder, model.upsamplers, settings, guides=model.guides)
    anything = manipulate.unconditional(guided, 1)
    assert torch.equal(anything, manipulate.unconditional(model, 1))
    assert not torch.equal(anything, manipulate.unconditional(guided, 1, labels={"shape": "circle"}))
    towards = {"sampling": {"decoder": replace(decoder, clip_guidance=0.0)}}
    way = manipulate.interpolate_prompts(guided, "a red circle", "a blue square", steps=2)
    assert torch.equal(way, manipulate.interpolate_prompts(model, "a red circle", "a blue square", steps=2, **towards))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"labels": {"size": "large"}}, "no label 'size'; it was trained on shape, colour"),
        ({"labels": {"shape": "cross"}}, "no class 'cross'; its classes: circle, square"),
        ({"labels": {"shape": "circle"}, "label_guidance": -1.0}, "label_guidance must be a finite number"),
        ({"clip_guidance": float("nan")}, "clip_guidance must be a finite number"),
    ],
)
def test_impossible_guidance_is_refused(model: UnCLIP, how, reason):
    with pytest.raises(Refused, match=reason):
        model.generate(["a red circle"], **how)


def test_a_release_without_guides_says_so(model: UnCLIP):
    bare = UnCLIP(model.clip, model.prior, model.decoder, model.upsamplers, model.sampling)
    with pytest.raises(Refused, match=r"this release has none\. Train one with a recipe's section `noised_clip`"):
        bare.generate(["a red circle"], clip_guidance=2.0)
    with pytest.raises(Refused, match="label 'shape' needs a classifier"):
        bare.generate(["a red circle"], labels={"shape": "circle"})
    upsampling = {"upsampler-32": replace(model.sampling["upsampler-32"], clip_guidance=1.0)}
    with pytest.raises(Refused, match="are the decoder's, and upsampler-32 is another model"):
        model.generate(["a red circle"], sampling=upsampling)


def test_settings_that_a_releases_guides_cannot_follow_are_refused_when_it_is_made(
    parts: dict[str, Path], tmp_path: Path
):
    there = {name: path for name, path in parts.items() if name != "noised-clip"}
    asked = SAMPLING | {"decoder": replace(SAMPLING["decoder"], clip_guidance=1.0)}
    with pytest.raises(Refused, match="CLIP guidance of 1 needs"):
        save_release(tmp_path / "a", "tiny", there, asked)
    asked = SAMPLING | {"decoder": replace(SAMPLING["decoder"], labels={"shape": "cross"})}
    with pytest.raises(Refused, match="no class 'cross'"):
        save_release(tmp_path / "b", "tiny", there, asked)


def test_guides_of_another_decoder_or_clip_are_refused(parts: dict[str, Path], tmp_path: Path):
    config = ClassifierConfig(**small(size=32, attention=(16,), labels=("shape",), classes=CLASSES[:1]))
    save_model(tmp_path / "large", "classifier", config, Classifier(config).state_dict())
    with pytest.raises(Refused, match="classifier was made for size 32, and the decoder's is 16"):
        save_release(tmp_path / "a", "tiny", parts | {"classifier": tmp_path / "large"}, SAMPLING)
    noised = NoisedClipConfig(**small(embedding=32))
    save_model(tmp_path / "other", "noised_clip", noised, NoisedClip(noised).state_dict(), clip="feedfeedfeedfeed")
    with pytest.raises(Refused, match=r"noised-clip in .* was trained on embeddings of the CLIP feedfeedfeed"):
        save_release(tmp_path / "b", "tiny", parts | {"noised-clip": tmp_path / "other"}, SAMPLING)
