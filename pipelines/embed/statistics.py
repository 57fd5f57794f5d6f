"""Mean, deviation and principal components of the embeddings, over all rows that curate lets stay.

They are computed once for all models, in float64 and in manifest order, and then belong to the model that was trained
with them: a warm start keeps its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import Refused
from infra.records import Action, Manifest, Record, object_name
from infra.store import Store
from pipelines.select import read_selection
from pipelines.stage import StageBase

TENSORS = "statistics.safetensors"
LEAST_STD = 1e-6  # a constant dimension is divided by this, and stays 0


@dataclass
class Moments:
    """Count, mean and (co)variance of vectors [d], added block by block."""

    covariance: bool
    """Whether the whole matrix is kept ([d, d]), or its diagonal alone ([d])."""
    count: int = 0
    shift: Any = None
    """The first block's mean: what is squared is the distance to it, so that nothing cancels."""
    total: Any = 0.0
    square: Any = 0.0

    def add(self, vectors: np.ndarray) -> None:
        """Adds rows, [n, d]."""
        rows = vectors.astype(np.float64)
        if self.shift is None:
            self.shift = rows.mean(0)
        rows -= self.shift
        self.count += len(rows)
        self.total = self.total + rows.sum(0)
        self.square = self.square + (rows.T @ rows if self.covariance else (rows * rows).sum(0))

    @property
    def mean(self) -> np.ndarray:
        """[d]."""
        return self.shift + self.total / self.count

    @property
    def variance(self) -> np.ndarray:
        """Of the population: the matrix [d, d] or its diagonal [d]."""
        off = self.total / self.count
        return self.square / self.count - (np.outer(off, off) if self.covariance else off * off)


@dataclass(frozen=True)
class Statistics(StageBase):
    """Stage: embed's rows through curate's selection → `statistics.safetensors`.

    float32: image_mean, image_std, text_mean, text_std [d]; pca [d, d], whose row k is the k-th principal component of
    the image embeddings; eigenvalues [d], falling. int64: count [1].
    """

    spec: dict[str, Any] = field(default_factory=dict)
    how = None
    name = group = role = "statistics"
    needs = ("embed", "curate")
    kind = "task"

    def run(self, action: Action, store: Store, out: Path) -> Record:
        from safetensors.numpy import save_file

        embed, curate = (Manifest.load(store, version) for version in action.inputs)
        image, text = Moments(covariance=True), Moments(covariance=False)
        for images, texts in vectors(store, embed, curate.only):
            image.add(images)
            text.add(texts)
        if image.count < 2:
            raise Refused(
                f"statistics: {image.count} rows are left, and models need at least 2. Loosen curate.rules.",
                code=5,
            )
        eigenvalues, components = principal(image.variance)
        tensors = {
            "image_mean": image.mean,
            "image_std": np.sqrt(np.maximum(np.diagonal(image.variance), LEAST_STD**2)),
            "text_mean": text.mean,
            "text_std": np.sqrt(np.maximum(text.variance, LEAST_STD**2)),
            "pca": components,
            "eigenvalues": eigenvalues,
        }
        arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
        save_file({**arrays, "count": np.array([image.count], np.int64)}, out / TENSORS)
        return Record.of(action, out, states={"counted": image.count})


def vectors(store: Store, embed: Manifest, curate: Record) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Image and text embeddings, float32 [n, d] each, of the rows that stay, a row group at a time, in order."""
    for record in embed.records:
        sha = record.sha("rows.parquet")
        uids = read_selection(store, curate.sha(f"{sha}.parquet"))
        with pq.ParquetFile(store.local(object_name(sha))) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, ["uid", "image_embedding", "text_embedding"], use_threads=False)
                table = table.filter(pc.is_in(table["uid"], value_set=uids))
                if table.num_rows:
                    yield _matrix(table["image_embedding"]), _matrix(table["text_embedding"])


def principal(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [d], falling and not negative, and components [d, d] as rows, their largest entry positive."""
    values, columns = np.linalg.eigh(covariance)
    rows = columns.T[::-1]
    largest = np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1)
    return np.maximum(values[::-1], 0), rows * np.where(largest < 0, -1.0, 1.0)


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    array = column.combine_chunks()
    return array.flatten().to_numpy().reshape(len(array), -1)
