"""A model over several workers: one flat vector each, or shards of it (FSDP2), and how it runs.

In goes a module; out come vectors whose gradients are summed over the workers in one fixed order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from training.parallel.flat import STATE_BYTES, Flat, Group, Vectors
    from training.parallel.fsdp import as_dtensor, gather_state, scatter_state, shard_module
    from training.parallel.modes import determinism, prepare_model, recomputed, seed
else:
    __getattr__ = exports(__name__)
