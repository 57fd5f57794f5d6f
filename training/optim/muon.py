"""Muon (Jordan et al. 2024): a matrix is updated by its momentum made orthogonal, so that no direction dominates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
STEPS = 5
A, B, C = 3.4445, -4.7750, 2.0315
"""A Newton–Schulz step is y ← (A + B·G + C·G²)·y with G = y·yᵀ; chosen for its slope at 0."""
MATCH = 0.2
"""Root mean square of AdamW's updates, which Muon's are scaled to (Liu et al. 2025), so that rates compare."""
ALL = slice(None)
OUTER = ("position", "embedding", "conv_in", "conv_out", "encoder.pool.out")
"""Parameters with these in their name are tables, or a network's first and last layers: AdamW's."""


def is_inner(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon is for this parameter: a matrix or convolution of some size inside the network."""
    wide = parameter.ndim in (2, 4) and min(parameter.flatten(1).shape) >= 16
    return wide and not any(part in name for part in OUTER)


def orthogonalise(x: Tensor) -> Tensor:
    """x [k, m, n] → about U·Vᵀ of each matrix's singular value decomposition, by five Newton–Schulz steps.

    Singular values end between 0.7 and 1.2. Long matrices take the steps on their small Gram matrix, in float32; the
    others, where the device multiplies it fast, take them in bfloat16.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT).mT
    y = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if x.shape[2] >= 3 * x.shape[1]:
        return _by_gram(y)
    y = y.bfloat16() if _fast_bfloat16(x.device.type) else y
    for _ in range(STEPS):
        gram = y @ y.mT
        y = A * y + torch.baddbmm(B * gram, gram, gram, alpha=C) @ y
    return y.to(x.dtype)


def _by_gram(y: Tensor) -> Tensor:
    """The same steps y ← p(y·yᵀ)·y, gathered into one factor before y [k, m, n], m < n: all but two products are m × m.

    Rounding could make an eigenvalue of the Gram matrix negative, which grows with each step; in float32 not enough to
    matter.
    """
    gram, factor = y @ y.mT, None
    eye = torch.eye(gram.shape[1], device=y.device)
    for step in range(STEPS):
        polynomial = torch.baddbmm(B * gram, gram, gram, alpha=C) + A * eye
        factor = polynomial if factor is None else polynomial @ factor
        if step < STEPS - 1:
            gram = polynomial @ gram @ polynomial
    assert factor is not None
    return factor @ y


def direction(gradient: Tensor, momentum: Tensor, mine: slice = ALL) -> Tensor:
    """Takes the gradient [k, m, n] into its momentum, in place; where `mine` of the k matrices are to move to."""
    momentum.lerp_(gradient, 1 - MOMENTUM)
    return orthogonalise(gradient[mine].lerp(momentum[mine], MOMENTUM))


def move_(weights: Tensor, update: Tensor, lr: float, decay: float) -> None:
    """One step in place of k matrices of one shape [k, m, n] in their directions."""
    if decay:
        weights.mul_(1 - lr * decay)
    weights.add_(update, alpha=-lr * MATCH * max(weights.shape[1:]) ** 0.5)


def assigned(shapes: Sequence[tuple[int, int, int]], ranks: int) -> list[list[slice]]:
    """[rank][stack] → the matrices of a stack [k, m, n] whose directions that rank computes for all.

    Equal shares, of which the rest goes to those that have the least to do so far.
    """
    work, found = [0] * ranks, [list[slice]() for _ in range(ranks)]
    for count, rows, columns in shapes:
        more = sorted(range(ranks), key=work.__getitem__)[: count % ranks]
        start = 0
        for rank in range(ranks):
            stop = start + count // ranks + (rank in more)
            found[rank].append(slice(start, stop))
            work[rank] += (stop - start) * rows * columns * min(rows, columns)
            start = stop
    return found


@cache
def _fast_bfloat16(device: str) -> bool:
    able = torch.cpu.get_capabilities() if device == "cpu" else {"amx_bf16": True}
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
