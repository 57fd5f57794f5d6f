"""Rules about what CLIP sees in a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from pipelines.select.rules.base import COSINE, EMBEDDING, BaseRule, unit_embeddings
from unclip.config import COUNT, Range

_SAMPLE, _LEAST = 256, 39  # rows of a cluster that k-means learns from at most and at least: faiss's own bounds
_BATCH = 1024  # rows that are searched for at a time


@dataclass(frozen=True, kw_only=True)
class SemanticDuplicates(BaseRule):
    """Rejects every picture that means the same as one that stays and came before it: the first of them stays.

    SemDeDup (Abbas et al. 2023, arXiv 2303.09540): CLIP's image embeddings fall into clusters (spherical k-means), and
    two rows of one cluster are equal where their cosine reaches `min_cosine`. Of equals the paper keeps the one that is
    farthest from the centroid, we the first, so that growth changes no verdict; a pair that two clusters part is
    missed. Clusters are learned from the first 256 × `clusters` rows: while there are fewer, more rows may change older
    verdicts, and there are no more clusters than rows / 39. A row is compared with all centroids, and with the rows of
    one cluster.

    The one rule whose look is long: 2 × width bytes a row (the direction in float16). Memory is the same for every row
    that stays; put it before `clip_score` with a top fraction, which waits for the last look.
    """

    min_cosine: float
    """Cosine of two embeddings from which on they are the same, as 0.95."""
    clusters: int = 1000
    """Clusters; about rows / 1000 is quick."""
    rule: Literal["semantic_duplicates"] = "semantic_duplicates"
    columns: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    bounds: ClassVar[Mapping[str, Range]] = {"min_cosine": COSINE, "clusters": COUNT}

    def features(self, rows: pa.Table) -> pa.Table:
        z = unit_embeddings(rows)
        flat = pa.array(z.astype(np.float16).reshape(-1))
        return pa.table({"direction": pa.FixedSizeListArray.from_arrays(flat, z.shape[1])})

    def reject(self, looks: Iterable[pa.Table]) -> Iterator[np.ndarray]:
        stream = (_vectors(look) for look in looks)
        first, rows = [], 0
        for vectors in stream:
            first.append(vectors)
            rows += len(vectors)
            if rows >= _SAMPLE * self.clusters:
                break
        if not rows:
            yield from (np.zeros(0, bool) for _ in first)
            return
        index = _clustered(np.concatenate(first)[: _SAMPLE * self.clusters], self.clusters)
        while first:
            yield self._repeats(index, first.pop(0))
        for vectors in stream:
            yield self._repeats(index, vectors)

    def _repeats(self, index: Any, vectors: np.ndarray) -> np.ndarray:
        """bool [rows] of float32 [rows, width]: which have an equal in the index or before them; the others join it."""
        rejected = np.zeros(len(vectors), bool)
        for at in range(0, len(vectors), _BATCH):
            batch = vectors[at : at + _BATCH]
            found, _ = index.search(batch, 1)
            bad = found[:, 0] >= self.min_cosine
            _, cluster = index.quantizer.search(batch, 1)
            alike = (batch @ batch.T >= self.min_cosine) & (cluster == cluster.T)
            for row in np.flatnonzero(np.tril(alike, -1).any(1)):
                bad[row] |= (alike[row, :row] & ~bad[:row]).any()
            index.add(np.ascontiguousarray(batch[~bad]))
            rejected[at : at + _BATCH] = bad
        return rejected


def _clustered(sample: np.ndarray, clusters: int) -> Any:
    """An empty faiss index of rows by cluster, whose centroids were learned from float32 [rows, width]."""
    import faiss

    width, count = sample.shape[1], max(1, min(clusters, len(sample) // _LEAST))
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(width), width, count, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
    )
    index.cp.spherical, index.cp.seed, index.cp.min_points_per_centroid = True, 0, 1
    index.nprobe = 1
    index.train(sample)
    return index


def _vectors(look: pa.Table) -> np.ndarray:
    """float32 [rows, width] of a look."""
    column = look["direction"].combine_chunks()
    return np.asarray(column.flatten(), np.float32).reshape(-1, column.type.list_size)
