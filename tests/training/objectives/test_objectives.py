from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from infra.records.manifest import Manifest
from infra.records.objects import object_name
from infra.tracking.monitor import NullMonitor
from tests.fixtures.fits import Tiny, tiny
from training.data.batches import Batch, Data
from training.data.order import Order
from training.job import FitHow
from training.launch import train_local
from training.objectives.choice import objective
from training.optim.optimizer import Optimiser
from training.options import TrainConfig
from training.parallel.flat import Flat, Group
from unclip.diffusion.schedule import Schedule
from unclip.pictures import to_unit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("tiny"))


def furnished(world: Tiny, kind: str, **train):
    """(objective, model, a batch of 16) of a tiny fit."""
    job = world.job(kind, steps=1, batch=16, **train)
    task = objective(job, world.store, CPU)
    torch.manual_seed(0)
    model = task.build()
    versions = job.data["rows"], job.data["selection"]
    data = Data(world.store, *versions, task.reads, read_text=task.read_text, cache=1 << 28)
    return task, model, data.batch(Order(data.counts, 1, 16, 4, 0).rows(0, 0), seed=5)


def again(batch: Batch, seed: int | None = None) -> Batch:
    return Batch(batch.seed if seed is None else seed, batch.uids, batch.captions, batch.tensors)


@pytest.mark.parametrize("kind", ["prior", "decoder", "upsampler", "classifier", "noised_clip"])
def test_the_loss_depends_on_the_micro_batchs_seed_and_on_nothing_else(world, kind):
    task, model, batch = furnished(world, kind)
    one = task.loss(model, again(batch), Group())
    torch.manual_seed(99)
    assert torch.equal(one.loss, task.loss(model, again(batch), Group()).loss)
    assert not torch.equal(one.loss, task.loss(model, again(batch, 6), Group()).loss)
    assert one.loss.shape == one.place.shape == (16,)
    assert 0 <= float(one.place.min()) <= float(one.place.max()) < 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prior", "ar_prior", "decoder", "upsampler", "classifier", "noised_clip"])
def test_a_batch_can_be_learned_by_heart(world, kind):
    task, model, batch = furnished(world, kind)
    model.train()
    flat = Flat(model)
    optimiser = Optimiser(flat, TrainConfig(steps=20))
    losses = []
    for step in range(20):
        flat.gradient.zero_()
        loss = task.loss(model, again(batch, step % 2), Group()).loss.mean()
        loss.backward()
        optimiser.step(5e-3)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("kind", ["prior", "ar_prior"])
def test_a_dropped_caption_cannot_be_seen_and_a_kept_one_can(world, kind):
    def loss(drop: float, shift: float) -> torch.Tensor:
        task, model, batch = furnished(world, kind, drop_text=drop)
        batch.tensors["text_states"] = batch.tensors["text_states"] + shift
        if kind == "prior":  # the autoregressive one is also asked for z_i·z_t, which is no secret
            batch.tensors["text_embedding"] = batch.tensors["text_embedding"] + shift
        return task.loss(model, batch, Group()).loss

    assert torch.equal(loss(1.0, 0.0), loss(1.0, 3.0))
    changed = loss(0.5, 0.0) != loss(0.5, 3.0)
    assert 2 <= int(changed.sum()) <= 14


def test_the_decoder_drops_image_and_caption_each_on_its_own(world):
    def loss(drop_image: float, drop_text: float, image: float = 0, text: float = 0) -> torch.Tensor:
        task, model, batch = furnished(world, "decoder", drop_image=drop_image, drop_text=drop_text)
        for parameter in model.unet.parameters():  # layers that start at zero hide the conditions
            torch.nn.init.normal_(parameter, std=0.05)
        batch.tensors["image_embedding"] = batch.tensors["image_embedding"] + image
        batch.tensors["text_embedding"] = batch.tensors["text_embedding"] + text
        return task.loss(model, batch, Group()).loss

    assert torch.equal(loss(1, 0), loss(1, 0, image=3))
    assert torch.equal(loss(0, 1), loss(0, 1, text=3))
    assert not torch.equal(loss(1, 0), loss(1, 0, text=3))
    assert not torch.equal(loss(0, 1), loss(0, 1, image=3))


def test_the_null_text_is_what_clip_says_of_the_empty_text(world):
    task, model, _ = furnished(world, "decoder")
    empty = task.clip.encode_text([""])
    assert torch.equal(model.null_text.embedding, empty.embedding[0])
    assert torch.equal(model.null_text.states, empty.states[0])
    assert torch.equal(model.null_text.mask, empty.mask[0])


def test_captions_reach_the_model_as_clip_reads_them(world):
    task, _, batch = furnished(world, "prior")
    read = task.clip.encode_text(batch.captions)
    torch.testing.assert_close(batch.tensors["text_states"], read.states)
    torch.testing.assert_close(batch.tensors["text_embedding"], read.embedding)
    assert torch.equal(batch.tensors["text_mask"], read.mask)


def test_a_crop_is_the_same_place_in_both_resolutions(world):
    task, _, batch = furnished(world, "upsampler", crop=8, blur=0.0)
    x0 = to_unit(batch.tensors["image"])
    high, low = task._cropped(x0, F.avg_pool2d(x0, 2), 8, batch)
    assert (high.shape[-1], low.shape[-1]) == (8, 4)
    assert torch.equal(F.avg_pool2d(high, 2), low)
    assert len({tuple(picture.flatten().tolist()) for picture in high}) > 8


@pytest.mark.slow
def test_clip_learns_which_caption_belongs_to_which_picture(world, tmp_path: Path):
    from unclip.clip.model import Clip

    class Losses(NullMonitor):
        first, last = None, None

        def metrics(self, _stage, _step, values):
            self.first = self.first or values["loss"]
            self.last = values["loss"]

    seen = Losses()
    job = world.job("clip", steps=60, batch=24, micro=12, warmup=5, lr=3e-3)
    facts = train_local(job, FitHow(log_seconds=0), world.store, tmp_path, seen)
    assert seen.last < 0.6 * seen.first
    clip = Clip.load(tmp_path)
    assert clip.fingerprint == facts["fingerprint"]
    captions, pictures = zip(*list(world.kept.values())[:20], strict=True)
    images = F.normalize(clip.encode_images(torch.stack([torch.from_numpy(picture) for picture in pictures])), dim=1)
    texts = F.normalize(clip.encode_text(captions).embedding, dim=1)
    similar = images @ texts.T
    assert similar.diagonal().mean() > similar.mean() + 0.1


def test_weights_of_every_tiny_model_are_trained(world):
    task, model, batch = furnished(world, "decoder", drop_image=0.5, drop_text=0.5)
    for parameter in model.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    flat = Flat(model)
    task.loss(model, batch, Group()).loss.sum().backward()
    still = [name for name, gradient in flat.split(flat.gradient).items() if not gradient.any()]
    assert still == []


def test_timesteps_can_be_drawn_where_the_noise_is(world):
    task, model, batch = furnished(world, "prior", t_mean=1.0, t_std=0.5)
    many = [task.loss(model, again(batch, seed), Group()).place for seed in range(40)]
    logits = torch.cat(many).add(0.0005).logit()
    assert float(logits.mean()) == pytest.approx(1.0, abs=0.1)
    assert float(logits.std()) == pytest.approx(0.5, abs=0.1)


def test_an_autoregressive_prior_starts_at_chance_and_takes_its_bounds_from_the_data(world):
    task, model, batch = furnished(world, "ar_prior", drop_text=0.0)
    losses = task.loss(model, again(batch), Group())
    assert losses.place is None
    assert losses.loss.shape == (16,)
    assert losses.loss.mean().item() == pytest.approx(math.log(16), abs=0.3)
    statistics = task.statistics
    assert torch.equal(model.pca.basis, statistics["pca"][:6])
    stored = [pq.read_table(path) for path in parquets(world)]
    dots = np.concatenate([np.einsum("nd,nd->n", *(stack(table, name) for name in EMBEDDINGS)) for table in stored])
    kept = np.concatenate([[uid in world.kept for uid in table["uid"].to_pylist()] for table in stored])
    np.testing.assert_allclose(model.dot_edges, np.quantile(dots[kept], np.arange(1, 16) / 16), rtol=1e-5)


def test_components_are_chosen_by_the_variance_that_the_data_have(world):
    job = world.job("ar_prior", steps=1)
    job.model.update(components=None, explained=0.5)  # of 32 equal eigenvalues
    task = objective(job, world.store, CPU)
    assert task.build().config.components == 16
    assert task.facts["components"] == 16


EMBEDDINGS = ("image_embedding", "text_embedding")


def parquets(world: Tiny) -> list[Path]:
    records = Manifest.load(world.store, world.embed).records
    return [world.store.local(object_name(record.sha("rows.parquet"))) for record in records]


def stack(table: pa.Table, name: str) -> np.ndarray:
    return np.stack(table[name].to_pylist()).astype(np.float64)


def test_noise_of_joined_micro_batches_does_not_depend_on_who_joined_them(world):
    """A contrastive loss sees a worker's micro-batches at once: each still draws from its own generator."""
    task, _, batch = furnished(world, "noised_clip")
    one, two = again(batch, 5), again(batch, 6)
    x0, schedule = to_unit(batch.tensors["image"]), Schedule.named("cosine")
    apart = [task._noise(schedule, x0, part) for part in (one, two)]
    both = Batch.joined([again(batch, 5), again(batch, 6)])
    joined = task._noise(schedule, torch.cat([x0, x0]), both)
    for found, expected in zip(joined, zip(*apart, strict=True), strict=True):
        assert torch.equal(found, torch.cat(expected))


def test_a_clip_can_learn_from_noised_pictures(world):
    """At a share of 0 the pictures are CLIP's own, at 1 each is noised to a timestep of its own, half-way at a half."""

    def changed(share: float) -> torch.Tensor:
        job = world.job("clip", steps=1, batch=16, noised=share)
        task = objective(job, world.store, CPU)
        data = Data(world.store, job.data["rows"], job.data["selection"], task.reads)
        batch = data.batch(Order(data.counts, 1, 16, 4, 0).rows(0, 0), seed=5)
        return (task._noised(batch) - batch.tensors["image"] / 255).flatten(1).std(1)

    none, half, every = changed(0.0), changed(0.5), changed(1.0)
    assert float(none.max()) < 1e-6
    assert 2 <= int((half > 1e-3).sum()) <= 14
    assert int((every > 1e-3).sum()) == len(every.unique()) == 16
