"""CLIP's loss over a batch that lies on two workers, against open_clip's over the whole batch in one."""

from __future__ import annotations

import math
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infra.errors import Refused
from tests.fixtures.fits import CLIP
from training.data.batches import Batch
from training.job import Job
from training.loop import check_divisible
from training.objectives.clip import ClipObjective
from training.parallel.flat import Group

VIT = CLIP | {"vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}}
WHOLE = 6


def parts(rank: int, ranks: int) -> tuple[ClipObjective, torch.nn.Module, Batch]:
    """The objective, the model, and this worker's rows of one batch, the same in every process."""
    task = ClipObjective(Job("clip", "k", "clip", VIT, {"steps": 1, "batch": WHOLE}, {}))
    torch.manual_seed(0)
    model = task.build().train()
    pictures = torch.randint(0, 256, (WHOLE, 3, 32, 32), dtype=torch.uint8)
    tokens = task.read_text([f"a {colour} circle" for colour in ("red", "green", "blue", "pink", "grey", "black")])
    mine = slice(rank * WHOLE // ranks, (rank + 1) * WHOLE // ranks)
    return task, model, Batch(0, (), (), {"image": pictures[mine], "tokens": tokens["tokens"][mine]})


def worker(rank: int, root: Path, answers: Any) -> None:
    """Loss and gradient of one of two workers, added up as the loop does it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=2)
    group = Group(rank, 2)
    task, model, batch = parts(rank, 2)
    losses = task.loss(model, batch, group).loss
    (losses.sum() / WHOLE).backward()
    for parameter in model.parameters():
        group.add(parameter.grad)
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    answers.put((rank, losses.detach().numpy(), gradients))
    torch.distributed.destroy_process_group()


def test_a_temperature_at_its_bound_can_still_come_back() -> None:
    """Of captions that fit no picture a large scale is wrong: the gradient must lead it down, from beyond the bound."""
    task, model, batch = parts(0, 1)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(task.options.max_scale) + 0.1)
    losses = task.loss(model, batch, Group())
    assert model.logit_scale.exp().item() == pytest.approx(task.options.max_scale)
    losses.loss.mean().backward()
    assert model.logit_scale.grad.item() > 0


def test_batch_norms_are_trained_on_one_worker() -> None:
    def built(config: dict[str, Any]) -> torch.nn.Module:
        return ClipObjective(Job("clip", "k", "clip", config, {"steps": 1}, {})).build()

    with pytest.raises(Refused, match=r"clip: this model has batch norms .* 2 workers would train another"):
        check_divisible("clip", built(CLIP), 2)
    check_divisible("clip", built(CLIP), 1)
    check_divisible("clip", built(VIT), 2)


@pytest.mark.slow
def test_two_workers_have_the_loss_and_the_gradient_of_open_clips_whole_batch(tmp_path: Path) -> None:
    from open_clip.loss import ClipLoss

    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    workers = [spawn.Process(target=worker, args=(rank, tmp_path, answers)) for rank in range(2)]
    for process in workers:
        process.start()
    found = {rank: (losses, gradients) for rank, losses, gradients in (answers.get(timeout=300) for _ in workers)}
    for process in workers:
        process.join()

    task, model, batch = parts(0, 1)
    images = model.encode_image(task.preprocess(batch.tensors["image"]), normalize=True)
    texts = model.encode_text(batch.tensors["tokens"], normalize=True)
    whole = ClipLoss()(images, texts, model.logit_scale.exp())
    whole.backward()
    assert np.concatenate([found[rank][0] for rank in range(2)]).mean() == pytest.approx(whole.item(), abs=1e-6)
    assert whole.item() > 0.1
    for name, parameter in model.named_parameters():
        assert np.abs(parameter.grad.numpy()).max() > 0, name
        for rank in range(2):
            np.testing.assert_allclose(found[rank][1][name], parameter.grad.numpy(), atol=1e-6, rtol=1e-4)
