from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from infra.errors import Refused
from training.optim.ema import Ema, ema_decay
from training.optim.muon import assigned, is_inner, orthogonalise
from training.optim.optimizer import MAX_SKIPPED_IN_A_ROW, Optimiser, learning_rate
from training.options import TrainConfig
from training.parallel.flat import Flat, Group
from unclip.models.noised_clip import NoisedClip, NoisedClipConfig
from unclip.presets import DEMO


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    model(x).square().sum().backward()


def test_the_flat_optimiser_is_torchs_adamw_with_decay_on_matrices_alone():
    config = TrainConfig(steps=20, lr=0.01, weight_decay=0.1, beta2=0.95, clip_norm=0.5)
    ours, theirs = network(), network()
    flat = Flat(ours)
    optimiser = Optimiser(flat, config)
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=config.eps)
    for step in range(10):
        flat.gradient.zero_()
        backward(ours, step)
        norm = optimiser.step(0.01)
        reference.zero_grad()
        backward(theirs, step)
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)), rel=1e-5)
        reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def larger() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 24), nn.Linear(24, 24), nn.Linear(24, 32), nn.Linear(32, 24), nn.Linear(24, 24))


@pytest.mark.parametrize("muon", [0.0, 0.02])
def test_a_restored_optimiser_goes_on_exactly(muon):
    config = TrainConfig(steps=20, lr=0.01, muon=muon)
    inner = is_inner if muon else None

    def run(restore_at: int | None) -> torch.Tensor:
        model = larger()
        flat = Flat(model, inner=inner)
        optimiser = Optimiser(flat, config)
        for step in range(8):
            if step == restore_at:
                weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                saved = {name: tensor.clone() for name, tensor in optimiser.state().items()}
                updates = optimiser.updates
                model = larger()
                flat = Flat(model, inner=inner)
                model.load_state_dict(weights)
                optimiser = Optimiser(flat, config)
                for name, view in optimiser.state().items():
                    view.copy_(saved[name])
                optimiser.resume(updates, 0)
            flat.gradient.zero_()
            backward(model, step)
            optimiser.step(0.01)
        return flat.weights

    assert torch.equal(run(None), run(5))


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    model = network()
    flat = Flat(model)
    optimiser = Optimiser(flat, TrainConfig(steps=5))
    before = flat.weights.clone()
    flat.gradient[3] = float("nan")
    optimiser.step(0.1)
    assert torch.equal(flat.weights, before)
    assert (optimiser.skipped, optimiser.updates) == (1, 0)


def test_a_run_that_only_skips_is_refused():
    flat = Flat(network())
    optimiser = Optimiser(flat, TrainConfig(steps=5))
    flat.gradient.fill_(float("inf"))
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        optimiser.step(0.1)
    with pytest.raises(Refused, match="diverged"):
        optimiser.step(0.1)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    config = TrainConfig(steps=110, lr=2.0, warmup=10)
    rates = [learning_rate(config, step) for step in range(111)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0)
    assert rates[110] == pytest.approx(0.0, abs=1e-12)
    constant = TrainConfig(steps=110, lr=2.0, warmup=10, decay="constant")
    assert learning_rate(constant, 109) == 2.0


def test_the_parameters_stay_views_of_the_flat_vectors():
    model = network()
    flat = Flat(model, extra=2)
    backward(model, 0)
    assert flat.weights[flat.matrices].numel() == 5 * 7 + 7 * 3
    assert torch.equal(flat.split(flat.gradient)["2.bias"], model[2].bias.grad)
    flat.weights.zero_()
    assert all(not parameter.any() for parameter in model.parameters())
    assert flat.extra.tolist() == [0, 0]


def test_the_average_forgets_its_random_start():
    assert ema_decay(0.999, 0.1, 1) == 0
    assert ema_decay(0.999, 0.1, 100) == pytest.approx(0.9)
    assert ema_decay(0.999, 0.1, 1_000_000) == 0.999


def test_the_average_is_the_recurrence_over_weights_and_running_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    flat = Flat(model)
    ema = Ema(model, flat, decay=0.5, ramp=1.0)
    weight, running = model[0].weight.detach().clone(), model[1].running_mean.clone()
    for update in (1, 2, 3):
        with torch.no_grad():
            flat.weights.add_(1)
            model[1].running_mean.add_(2)
            model[1].num_batches_tracked += 1
        ema.update(update)
        decay = ema_decay(0.5, 1.0, update)
        weight = decay * weight + (1 - decay) * model[0].weight.detach()
        running = decay * running + (1 - decay) * model[1].running_mean
    state = ema.state()
    torch.testing.assert_close(state["0.weight"], weight)
    torch.testing.assert_close(state["1.running_mean"], running)
    assert state["1.num_batches_tracked"] == 3
    assert list(state) == list(model.state_dict())


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (20, 90), (90, 20), (30, 30)])
def test_muons_update_is_orthogonal_and_keeps_the_gradients_directions(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    update = orthogonalise(x)
    values = torch.linalg.svdvals(update)
    assert float(values.max()) < 1.3
    assert float(values.median()) > 0.7
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    aligned = (update * (u @ v)).sum((1, 2)) / min(shape)
    assert float(aligned.min()) > 0.75


def test_muon_takes_matrices_of_one_shape_together_and_leaves_the_rest_to_adamw():
    model = larger()
    flat = Flat(model, inner=is_inner)
    assert [shape for _, shape in flat.stacks] == [(2, 24, 24), (1, 24, 32), (1, 32, 24)]
    assert flat.weights[flat.matrices].numel() == 5 * 24
    before = {name: view.clone() for name, view in flat.split(flat.weights).items()}
    flat.gradient.normal_()
    optimiser = Optimiser(flat, TrainConfig(steps=5, lr=0.01, muon=0.02))
    optimiser.step(0.005)
    for name, view in flat.split(flat.weights).items():
        step = (view - before[name]).square().mean().sqrt().item()
        assert step == pytest.approx(0.2 * 0.01 if name in flat.stacked else 0.005, rel=0.3), name
    assert {name for name in optimiser.state() if name.startswith("second.")} == {
        f"second.{name}" for name in flat.shapes if name not in flat.stacked
    }


class Meeting(Group):
    """Ranks that are threads, whose vectors are added up when all are there."""

    def __init__(self, rank: int, vectors: list[torch.Tensor | None], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(vectors))
        object.__setattr__(self, "told", (vectors, barrier))

    def add(self, vector: torch.Tensor) -> None:
        vectors, barrier = self.told
        vectors[self.rank] = vector.clone()
        barrier.wait()
        vector.copy_(sum(vectors))
        barrier.wait()


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_that_share_muons_products_take_the_step_that_one_takes(ranks):
    models = [larger() for _ in range(ranks + 1)]  # here: threads would draw from one generator

    def weights(group: Group, model: nn.Module) -> torch.Tensor:
        flat = Flat(model, inner=is_inner)
        flat.gradient.copy_(torch.randn(len(flat.gradient), generator=torch.Generator().manual_seed(0)))
        optimiser = Optimiser(flat, TrainConfig(steps=5, lr=0.01, muon=0.02, weight_decay=0.1), group)
        for _ in range(3):
            optimiser.step(0.005)
        return flat.weights

    barrier, vectors = threading.Barrier(ranks), [None] * ranks
    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(weights, [Meeting(rank, vectors, barrier) for rank in range(ranks)], models))
    alone = weights(Group(), models[-1])
    assert all(torch.equal(one, alone) for one in found)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 64), st.integers(1, 64)), max_size=6), st.integers(1, 8))
def test_each_matrix_is_dealt_to_one_rank(shapes, ranks):
    shares = assigned(shapes, ranks)
    for stack, (count, _, _) in enumerate(shapes):
        assert [n for share in shares for n in range(count)[share[stack]]] == list(range(count))


def test_tables_first_and_last_layers_of_an_encoder_are_adamws():
    with torch.device("meta"):
        model = NoisedClip(NoisedClipConfig(**vars(DEMO.encoder), embedding=64))
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    outer = {name for name, parameter in model.named_parameters() if name in matrices and not is_inner(name, parameter)}
    assert outer == {"encoder.conv_in.weight", "encoder.pool.positions", "encoder.pool.out.weight"}
