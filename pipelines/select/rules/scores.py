"""Rules about a number that somebody gave a row: CLIP, the list itself, or a linear head on CLIP's embedding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.errors import Refused
from pipelines.select.rules.base import COSINE, EMBEDDING, NOT_IN_KEY, BaseRule, FileRule, numbers, unit_embeddings
from unclip.config import PART, Range

_ANY = Range(-1e30, 1e30)


@dataclass(frozen=True, kw_only=True)
class ClipScore(BaseRule):
    """Rejects pairs whose picture and caption are far apart in CLIP's eyes: by a threshold, or all but a top fraction.

    The score is the cosine of image and text embedding. A threshold decides about each row alone; the top fraction is
    taken over all rows, so growth may change old selections and everything behind them. Of equal scores the first
    stay. A score that is not a number is the lowest. For a top fraction 13 bytes a row are held.
    """

    min_score: float | None = None
    """Cosine, at least."""
    top_fraction: float | None = None
    """Fraction of rows that stay, rounded up."""
    rule: Literal["clip_score"] = "clip_score"
    columns: ClassVar[tuple[str, ...]] = ("score",)
    bounds: ClassVar[Mapping[str, Range]] = {"min_score": COSINE, "top_fraction": PART}

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.min_score is None) == (self.top_fraction is None):
            raise Refused("rule clip_score: give either min_score (a cosine) or top_fraction")

    def features(self, rows: pa.Table) -> pa.Table:
        return pa.table({"score": rows["score"].cast(pa.float32())})

    def reject(self, looks: Iterable[pa.Table]) -> Iterator[np.ndarray]:
        scores = (np.nan_to_num(numbers(look, "score"), nan=-np.inf) for look in looks)
        if self.top_fraction is None:
            yield from (one < self.min_score for one in scores)
            return
        every = [one.astype(np.float32, copy=False) for one in scores]
        stays = _top(np.concatenate(every) if every else np.empty(0, np.float32), self.top_fraction)
        at = 0
        for one in every:
            yield ~stays[at : at + len(one)]
            at += len(one)


def _top(scores: np.ndarray, fraction: float) -> np.ndarray:
    """bool [rows]: the ⌈fraction × rows⌉ highest of float32 [rows], of equal ones the first."""
    count = int(np.ceil(fraction * len(scores)))
    if not 0 < count < len(scores):
        return np.full(len(scores), count > 0)
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    stays = scores > least
    stays[np.flatnonzero(scores == least)[: count - int(np.count_nonzero(stays))]] = True
    return stays


@dataclass(frozen=True, kw_only=True)
class _Scored(FileRule, ABC):
    """A score a row, from a column that was kept from the list (`source.columns.keep`), or from a linear head.

    The head's score is w·z/‖z‖ + b, z being CLIP's image embedding and w, b the tensors `weight` [1, width] and `bias`
    [1] of a safetensors file (LAION's aesthetic predictors are of this form: a stack of linear layers is one). It is
    compared as it is: give the logit of a probability.

    Null, NaN, and texts that are no number are unknown.
    """

    column: str | None = None
    """A column of the list."""
    head: str | None = field(default=None, metadata=NOT_IN_KEY)
    """A safetensors file with `weight` and `bias`."""
    unknown: Literal["keep", "reject"] = "reject"
    """What becomes of rows without a score."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.column is None) == (self.head is None):
            raise Refused(f"rule {self.rule}: give either column (kept from the list) or head (a safetensors file)")
        if self.column == "":
            raise Refused(f"rule {self.rule}: column is empty; name one of source.columns.keep")
        if self.sha256 and self.head is None:
            raise Refused(f"rule {self.rule}: sha256 is given without head")

    @property
    def columns(self) -> tuple[str, ...]:
        """The list's column, or the embedding."""
        return (EMBEDDING,) if self.column is None else (self.column,)

    def opened(self) -> Any:
        """With the head's bytes."""
        if self.head is None:
            return self
        rule = self._read(self.head)
        _ = rule._tensors  # refused here, before anything is started
        return rule

    def features(self, rows: pa.Table) -> pa.Table:
        if self.column is None:
            weight, bias = self._tensors
            z = unit_embeddings(rows)
            if z.shape[1] != len(weight):
                raise Refused(
                    f"rule {self.rule}: {self.head} is for embeddings of width {len(weight)}, and CLIP's has "
                    f"{z.shape[1]}; take a head for this CLIP"
                )
            return pa.table({"score": pa.array(z @ weight + bias, pa.float32())})
        return pa.table({"score": _as_numbers(rows[self.column])})

    def reject(self, looks: Iterable[pa.Table]) -> Iterator[np.ndarray]:
        for look in looks:
            scores = numbers(look, "score")
            yield np.where(np.isnan(scores), self.unknown == "reject", self._bad(scores))

    @abstractmethod
    def _bad(self, scores: np.ndarray) -> np.ndarray:
        """bool [rows], which scores do not stay; NaN is judged by `unknown`."""

    @cached_property
    def _tensors(self) -> tuple[np.ndarray, float]:
        """(w, float32 [width], b)"""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            tensors = load(self.content)
            weight, bias = tensors["weight"], tensors["bias"]
        except (SafetensorError, KeyError) as error:
            raise Refused(
                f"{self.head} is no safetensors file with `weight` and `bias` in float16 or float32 ({error}); "
                "a pickle is never read"
            ) from None
        if bias.size != 1 or weight.size != max(weight.shape, default=0):
            raise Refused(
                f"{self.head}: weight is {list(weight.shape)} and bias {list(bias.shape)}; a head with one score has "
                "[1, width] and [1]"
            )
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is told
            numbers = [one.astype(np.float32).reshape(-1) for one in (weight, bias) if one.dtype.kind == "f"]
        if len(numbers) != 2 or not all(np.isfinite(one).all() for one in numbers):
            raise Refused(
                f"{self.head}: weight is of {weight.dtype} and bias of {bias.dtype}; a head has finite floating-point "
                "numbers"
            )
        return numbers[0], float(numbers[1][0])


@dataclass(frozen=True, kw_only=True)
class _AtMost(_Scored):
    """Rejects pictures with a score above `max_score`."""

    max_score: float
    """Score, at most."""
    bounds: ClassVar[Mapping[str, Range]] = {"max_score": _ANY}

    def _bad(self, scores: np.ndarray) -> np.ndarray:
        return scores > self.max_score


@dataclass(frozen=True, kw_only=True)
class Watermark(_AtMost):
    """Rejects pictures that probably bear a watermark: those with a score above `max_score` (LAION: `pwatermark`)."""

    rule: Literal["watermark"] = "watermark"


@dataclass(frozen=True, kw_only=True)
class Nsfw(_AtMost):
    """Rejects pictures that are probably not safe for work: those with a score above `max_score` (LAION: `punsafe`)."""

    rule: Literal["nsfw"] = "nsfw"


@dataclass(frozen=True, kw_only=True)
class Aesthetic(_Scored):
    """Rejects pictures that few would like: those with a score below `min_score` (LAION: `aesthetic`, 1 … 10)."""

    min_score: float
    """Score, at least."""
    bounds: ClassVar[Mapping[str, Range]] = {"min_score": _ANY}
    rule: Literal["aesthetic"] = "aesthetic"

    def _bad(self, scores: np.ndarray) -> np.ndarray:
        return scores < self.min_score


def _as_numbers(column: pa.ChunkedArray) -> pa.Array:
    """A column as float32, with null for what is no number."""
    values = column.combine_chunks()
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return pa.array([_number(text) for text in values.to_pylist()], pa.float32())
    try:
        return pc.cast(values, pa.float32(), safe=False)
    except pa.ArrowException:
        return pa.nulls(len(values), pa.float32())


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
