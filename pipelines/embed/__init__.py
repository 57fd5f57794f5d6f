"""CLIP's embeddings of every row that stays, in Parquet, and their statistics.

In go tars, a selection and a CLIP; out come training rows: embeddings, caption and base picture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from pipelines.embed.stage import Embed, EmbedHow, EmbedSpec, load_clip
    from pipelines.embed.statistics import TENSORS, Statistics
else:
    __getattr__ = exports(__name__)
