"""Which sample comes next, and how it is read.

In go a version of the data and a position (step, lane); out come micro-batches, the same on any number of workers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from training.data.batches import Batch, Data, Reads, ReadText, decode_image, picture
    from training.data.blocks import BlockRef, as_matrix, block_refs
    from training.data.feed import Feed
    from training.data.labels import MISSING, Labels, class_table
    from training.data.order import Order, derive_seed
else:
    __getattr__ = exports(__name__)
