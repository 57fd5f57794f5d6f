"""Decoders that read captions themselves, and decoders that learn to fill in."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infra.errors import Refused, Stopped
from infra.tracking.monitor import NullMonitor
from tests.fixtures.fits import Tiny, stored, tiny
from training.data.batches import Batch, Data
from training.data.order import Order
from training.job import FitHow, Job
from training.launch import train_local
from training.objectives.base import read_clip
from training.objectives.choice import objective
from training.objectives.masks import random_masks
from training.optim.optimizer import Optimiser
from training.options import InpainterTrain, TrainConfig
from training.parallel.flat import Flat, Group
from unclip.errors import Refused as Impossible
from unclip.models.decoder import Decoder
from unclip.pictures import to_unit
from unclip.presets import TINY
from unclip.release.model import load_model, save_model

CPU = torch.device("cpu")
SHORT = {"steps": 3, "batch": 6, "micro": 3, "warmup": 1}
OWN = replace(TINY.decoder, text="own", vocabulary=600, text_depth=1, text_heads=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(world: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A trained decoder: its manifest's version, and its folder."""
    out = tmp_path_factory.mktemp("decoder")
    train_local(world.job("decoder", "finished", **SHORT), FitHow(), world.store, out, NullMonitor())
    return stored(world.store, out), out


def own_job(world: Tiny, key: str, *, image: bool = True, **train) -> Job:
    job = world.job("decoder", key, **{**SHORT, **train})
    return replace(job, model=asdict(replace(OWN, image=image)))


def inpainter_job(world: Tiny, start: str, key: str = "inpainter", **train) -> Job:
    job = world.job("inpainter", key, **{**SHORT, **train})
    return replace(job, data=job.data | {"start": start})


def furnished(world: Tiny, job: Job):
    """(objective, model, a batch of 16) of a job."""
    task = objective(job, world.store, CPU)
    torch.manual_seed(0)
    data = Data(world.store, job.data["rows"], job.data["selection"], task.reads, read_text=task.read_text)
    return task, task.build(), data.batch(Order(data.counts, 1, 16, 4, 0).rows(0, 0), seed=5)


def test_captions_reach_a_text_transformer_as_clips_tokens(world: Tiny):
    task, model, batch = furnished(world, own_job(world, "tokens"))
    assert torch.equal(batch.tensors["tokens"], task.clip.tokenize(batch.captions))
    assert "text_states" not in batch.tensors
    assert torch.equal(model.null_text.tokens, task.clip.tokenize([""])[0])


@pytest.mark.parametrize("image", [True, False])
def test_every_weight_of_it_is_trained(world: Tiny, image: bool):
    task, model, batch = furnished(world, own_job(world, "weights", image=image, drop_text=0.5, drop_image=0.5))
    assert ("image_embedding" in batch.tensors) == image
    for parameter in model.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    flat = Flat(model)
    task.loss(model, batch, Group()).loss.sum().backward()
    assert [name for name, gradient in flat.split(flat.gradient).items() if not gradient.any()] == []


def test_a_dropped_caption_cannot_be_read_and_a_kept_one_can(world: Tiny):
    def loss(drop: float, shift: int) -> Tensor:
        task, model, batch = furnished(world, own_job(world, "drops", image=False, drop_text=drop))
        for parameter in model.unet.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        tokens = batch.tensors["tokens"]
        words = (tokens > 0) & (tokens < 598)
        batch.tensors["tokens"] = torch.where(words, (tokens + shift - 1) % 597 + 1, tokens)
        return task.loss(model, batch, Group()).loss

    assert torch.equal(loss(1.0, 0), loss(1.0, 30))
    changed = loss(0.5, 0) != loss(0.5, 30)
    assert 2 <= int(changed.sum()) <= 14


@pytest.mark.parametrize("image", [True, False])
def test_the_loop_trains_it_and_what_it_saves_loads(world: Tiny, tmp_path: Path, image: bool):
    job = own_job(world, f"loop-{image}", image=image, muon=0.02)
    facts = train_local(job, FitHow(), world.store, tmp_path, NullMonitor())
    model = load_model(tmp_path, "decoder")
    assert model.config == replace(OWN, image=image)
    assert facts["samples"] == 18
    task = objective(job, world.store, CPU)
    torch.manual_seed(0)
    start = task.build().state_dict()
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])]
    assert {"text.embedding.weight", "text.positions"} <= set(moved)


def test_a_tokeniser_of_another_size_is_refused(world: Tiny):
    job = own_job(world, "vocabulary")
    job.model["vocabulary"] = 601
    with pytest.raises(Refused, match="vocabulary 601, and this CLIP has 600"):
        objective(job, world.store, CPU)


def test_masks_erase_something_of_every_kind():
    masks = random_masks(600, 16, torch.Generator().manual_seed(0))
    assert masks.shape == (600, 1, 16, 16)
    assert masks.dtype == torch.bool
    share = masks.float().mean((1, 2, 3))
    assert bool((share > 0).all())
    assert float((share == 1).float().mean()) < 0.05
    assert float(share.min()) < 0.05
    assert float(share.max()) > 0.95
    assert 0.25 < float(share.mean()) < 0.6
    middle = masks.float().mean(0)[0]
    assert float(middle.min()) > 0.15  # no place is always known
    again = random_masks(600, 16, torch.Generator().manual_seed(0))
    assert torch.equal(masks, again)


def test_an_inpainter_starts_from_the_finished_decoder_and_keeps_its_statistics(world: Tiny, finished):
    version, folder = finished
    task, model, batch = furnished(world, inpainter_job(world, version))
    state = load_model(folder, "decoder").state_dict()
    assert set(model.state_dict()) - set(state) == {"unet.conv_in_beside.weight"}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert not model.unet.conv_in_beside.weight.any()
    assert all(parameter.requires_grad for parameter in model.parameters())
    task.loss(model, batch, Group()).loss.sum().backward()
    assert model.unet.conv_in_beside.weight.grad.any()


def test_an_inpainter_that_is_told_nothing_learns_what_a_decoder_learns(world: Tiny, finished):
    version, folder = finished
    task, model, batch = furnished(world, inpainter_job(world, version, drop_known=1.0))
    with torch.no_grad():
        model.unet.conv_in_beside.weight.normal_()
    decoder, _, same = furnished(world, world.job("decoder", **SHORT))
    found = task.loss(model, batch, Group()).loss
    torch.testing.assert_close(found, decoder.loss(load_model(folder, "decoder"), same, Group()).loss)


def test_the_loop_trains_an_inpainter_on(world: Tiny, finished, tmp_path: Path):
    version, folder = finished
    facts = train_local(inpainter_job(world, version), FitHow(), world.store, tmp_path, NullMonitor())
    model = load_model(tmp_path, "inpainter")
    assert model.config == replace(TINY.decoder, inpaint=True)
    assert model.unet.conv_in_beside.weight.any()
    assert facts["data"]["start"] == version
    assert not torch.equal(model.unet.conv_in.weight, load_model(folder, "decoder").unet.conv_in.weight)


def test_an_interrupted_inpainter_ends_in_the_bytes_of_an_undisturbed_one(world: Tiny, finished, tmp_path: Path):
    whole, parts = (inpainter_job(world, finished[0], key) for key in ("whole", "parts"))
    train_local(whole, FitHow(), world.store, tmp_path / "whole", NullMonitor())
    with pytest.raises(Stopped):
        train_local(parts, FitHow(), world.store, tmp_path / "parts", NullMonitor(), stop=lambda: True)
    train_local(parts, FitHow(), world.store, tmp_path / "parts", NullMonitor(), lease_number=1)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_start_of_another_kind_or_clip_is_refused(world: Tiny, tmp_path: Path):
    save_model(tmp_path / "other", "decoder", TINY.decoder, Decoder(TINY.decoder).state_dict(), clip="feed")
    for version, said in (
        (world.clip, "holds a 'clip'"),
        (stored(world.store, tmp_path / "other"), "on the CLIP feed"),
    ):
        with pytest.raises(Impossible, match=said):
            objective(inpainter_job(world, version), world.store, CPU).build()
    with pytest.raises(Refused, match="drop_known"):
        InpainterTrain(steps=1, drop_known=2)


@pytest.mark.slow
def test_what_is_known_is_used_to_draw_what_is_erased(world: Tiny, tmp_path: Path):
    """Pictures of one colour each: under much noise only the known part tells which."""
    config = replace(TINY.decoder, prediction="x0", learned_range=False)
    clip = read_clip(world.store, world.clip)
    torch.manual_seed(0)
    save_model(tmp_path / "start", "decoder", config, Decoder(config).state_dict(), clip=clip.fingerprint)
    job = inpainter_job(world, stored(world.store, tmp_path / "start"), t_mean=2.0, t_std=1.0, drop_image=1.0)
    task, model, batch = furnished(world, replace(job, model=asdict(replace(config, inpaint=True))))
    flat = Flat(model)
    optimiser = Optimiser(flat, TrainConfig(steps=60))
    generator = torch.Generator().manual_seed(1)

    def painted(count: int) -> Tensor:
        colours = torch.randint(256, (count, 3, 1, 1), generator=generator, dtype=torch.uint8)
        return colours.expand(-1, -1, 16, 16)

    unseen, free = to_unit(painted(64)), random_masks(64, 16, generator)

    @torch.no_grad()
    def error(*, told: bool) -> float:
        """Mean squared error of x0 where it is erased, at a high noise level, over pictures it is not trained on."""
        t, noise = torch.full((64,), 900), torch.randn(unseen.shape, generator=torch.Generator().manual_seed(3))
        context = model.null_context(64)
        context = model.knowing(context, unseen, free) if told else context
        found = model.denoise(model.schedule.q_sample(unseen, noise, t), t, context).x0
        return float((found - unseen).square()[free.expand_as(unseen)].mean())

    before = error(told=True)
    for step in range(60):
        flat.gradient.zero_()
        images = batch.tensors | {"image": painted(16)}
        task.loss(model, Batch(step, batch.uids, batch.captions, images), Group()).loss.mean().backward()
        optimiser.step(4e-3)
    after, blind = error(told=True), error(told=False)
    assert after < 0.6 * before, (before, after, blind)
    assert after < 0.6 * blind, (before, after, blind)
