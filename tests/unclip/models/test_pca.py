"""Principal components against NumPy's singular values, and buckets that keep what they can."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unclip.errors import Refused
from unclip.models.ar_prior import AutoregressivePriorConfig
from unclip.models.pca import Pca, components_for, dequantise, quantise


@settings(deadline=None)
@given(
    st.integers(2, 4096),
    st.floats(0.01, 100),
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20),
)
def test_a_coordinate_comes_back_within_half_a_bucket(buckets, reach, places):
    coordinates = torch.tensor(places) * reach
    codes = quantise(coordinates, buckets, reach)
    assert 0 <= int(codes.min()) <= int(codes.max()) < buckets
    error = (dequantise(codes, buckets, reach) - coordinates).abs()
    assert float(error.max()) <= reach / buckets + 1e-6 * reach  # float32


@settings(deadline=None)
@given(st.integers(2, 4096), st.floats(0.01, 100))
def test_the_middle_of_a_bucket_lies_in_that_bucket(buckets, reach):
    codes = torch.arange(buckets)
    assert torch.equal(quantise(dequantise(codes, buckets, reach).float(), buckets, reach), codes)


def test_coordinates_out_of_reach_go_to_the_outermost_buckets():
    assert quantise(torch.tensor([-9.0, -4.0, 0.0, 4.0, 9.0]), 8, 4.0).tolist() == [0, 0, 4, 7, 7]


def correlated(count: int, width: int) -> np.ndarray:
    draw = np.random.default_rng(0)
    return draw.normal(size=(count, width)) * 0.7 ** np.arange(width) @ draw.normal(size=(width, width)) + 5


def by_svd(data: np.ndarray, kept: int) -> Pca:
    """Pca set from NumPy's singular value decomposition of the centred data."""
    _, values, rows = np.linalg.svd(data - data.mean(0), full_matrices=False)
    pca = Pca(data.shape[1], kept).double()
    pca.set(torch.tensor(data.mean(0)), torch.tensor(rows), torch.tensor(values**2 / len(data)))
    return pca


@pytest.mark.parametrize("kept", [1, 5, 12])
def test_k_components_give_the_best_approximation_of_rank_k(kept):
    data = correlated(200, 12)
    u, values, rows = np.linalg.svd(data - data.mean(0), full_matrices=False)
    pca = by_svd(data, kept)
    coordinates = pca.project(torch.tensor(data))
    np.testing.assert_allclose(coordinates.numpy(), u[:, :kept] * math.sqrt(len(data)), atol=1e-9)
    best = u[:, :kept] * values[:kept] @ rows[:kept] + data.mean(0)
    np.testing.assert_allclose(pca.reconstruct(coordinates).numpy(), best, atol=1e-9)
    np.testing.assert_allclose(pca.reconstruct(coordinates[:, :1]).numpy(), by_svd_first(data), atol=1e-9)


def by_svd_first(data: np.ndarray) -> np.ndarray:
    u, values, rows = np.linalg.svd(data - data.mean(0), full_matrices=False)
    return u[:, :1] * values[:1] @ rows[:1] + data.mean(0)


def test_components_are_those_that_the_statistics_of_a_run_hold():
    from pipelines.embed.statistics import Moments, principal

    data = correlated(300, 8)
    moments = Moments(covariance=True)
    for block in np.array_split(data, 4):
        moments.add(block)
    eigenvalues, components = principal(moments.variance)
    pca = Pca(8, 3).double()
    pca.set(*(torch.tensor(np.ascontiguousarray(part)) for part in (moments.mean, components, eigenvalues)))
    got, expected = (p.reconstruct(p.project(torch.tensor(data))) for p in (pca, by_svd(data, 3)))
    np.testing.assert_allclose(got.numpy(), expected.numpy(), atol=1e-6)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any), st.integers(1, 100))
def test_the_fewest_components_are_kept_that_explain_enough(eigenvalues, percent):
    falling = sorted(eigenvalues, reverse=True)
    fewest = next(k for k in range(1, len(falling) + 1) if 100 * sum(falling[:k]) >= percent * sum(falling))
    assert components_for(torch.tensor(falling, dtype=torch.float32), percent / 100) == fewest


def test_what_is_left_out_is_the_share_that_was_not_asked_for():
    data = correlated(500, 16)
    eigenvalues = np.linalg.svd(data - data.mean(0), compute_uv=False) ** 2 / len(data)
    shape = AutoregressivePriorConfig(16, 8, 4, width=8, depth=1, heads=1, explained=0.99)
    config = shape.fitted(torch.tensor(eigenvalues))
    errors = {}
    for kept in (config.kept - 1, config.kept):
        pca = by_svd(data, kept)
        lost = pca.reconstruct(pca.project(torch.tensor(data))).numpy() - data
        errors[kept] = (lost**2).sum(1).mean() / eigenvalues.sum()
    assert errors[config.kept] <= 0.01 < errors[config.kept - 1]
    assert config.tokens == config.kept + 1
    assert config.fitted(torch.ones(16)) == config


def test_a_dimension_that_never_varies_does_no_harm():
    pca = Pca(4, 4)
    pca.set(torch.zeros(4), torch.eye(4), torch.tensor([4.0, 1.0, 0.0, 0.0]))
    z = torch.tensor([[2.0, 1.0, 0.0, 0.0]])
    assert torch.allclose(pca.reconstruct(pca.project(z)), z)


def test_impossible_components_are_refused():
    with pytest.raises(Refused, match="5 principal components of 4"):
        Pca(4, 5)
    with pytest.raises(Refused, match="explained"):
        components_for(torch.ones(3), 1.5)
