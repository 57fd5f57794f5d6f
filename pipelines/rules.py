"""What a row must be to stay: each rule looks at one shard alone and decides over all of them.

`look` reduces a shard to a few bytes a row; `reject` goes through those small looks in manifest order. Among equals the
row that is first in the manifest stays, so what was decided about a shard does not change when others come after it
(except under `top_fraction`, which asks for just that).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.errors import Refused
from unclip.config import SIDE, WHOLE, Range, outside


class Rule(Protocol):
    """One rule of a recipe; a frozen dataclass whose `rule` is its name there and in every selection.

    Rules are applied in the recipe's order, and each sees only the rows that those before it let stay.
    """

    rule: Any
    columns: ClassVar[tuple[str, ...]]
    """Columns of the data that `look` reads."""

    def look(self, rows: pa.Table) -> pa.Table:
        """A few bytes a row, from `columns` of one shard's kept rows, in their order."""
        ...

    def reject(self, looks: Iterable[pa.Table]) -> Iterator[np.ndarray]:
        """For each look, in manifest order, bool [rows]: which rows do not stay."""
        ...


@dataclass(frozen=True)
class Size:
    """Rejects pictures whose original has a shorter side below `min_side` pixels."""

    min_side: int
    """Pixels of the shorter side, at least."""
    rule: Literal["size"] = "size"
    columns: ClassVar[tuple[str, ...]] = ("width", "height")

    def __post_init__(self) -> None:
        if wrong := outside(self, min_side=SIDE):
            raise Refused(f"rule size: {wrong}")

    def look(self, rows: pa.Table) -> pa.Table:
        return pa.table({"side": pc.min_element_wise(rows["width"], rows["height"])})

    def reject(self, looks: Iterable[pa.Table]) -> Iterator[np.ndarray]:
        for look in looks:
            yield _numbers(look, "side") < self.min_side


@dataclass(frozen=True)
class Aspect:
    """Rejects pictures whose original is more than `max_ratio` times as long as it is wide, or the other way round."""

    max_ratio: float
    """Longer side over shorter side, at most."""
    rule: Literal["aspect"] = "aspect"
    columns: ClassVar[tuple[str, ...]] = ("width", "height")

    def __post_init__(self) -> None:
        if wrong := outside(self, max_ratio=Range(1)):
            raise Refused(f"rule aspect: {wrong}")

    def look(self, rows: pa.Table) -> pa.Table:
        longer = pc.max_element_wise(rows["width"], rows["height"]).cast(pa.float64())
        return pa.table({"ratio": pc.divide(longer, pc.min_element_wise(rows["width"], rows["height"]))})

    def reject(self, looks: Iterable[pa.Table]) -> Iterator[np.ndarray]:
        for look in looks:
            yield _numbers(look, "ratio") > self.max_ratio


@dataclass(frozen=True)
class Caption:
    """Rejects captions that are too short or too long; surrounding blanks do not count."""

    min_characters: int = 1
    """Characters, at least."""
    max_characters: int | None = None
    """Characters, at most."""
    min_words: int = 1
    """Words (between blanks), at least."""
    max_words: int | None = None
    """Words, at most."""
    rule: Literal["caption"] = "caption"
    columns: ClassVar[tuple[str, ...]] = ("caption",)

    def __post_init__(self) -> None:
        bounds = dict.fromkeys(("min_characters", "max_characters", "min_words", "max_words"), WHOLE)
        if wrong := outside(self, **bounds):
            raise Refused(f"rule caption: {wrong}")
        for what in ("characters", "words"):
            least, most = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if most is not None and most < least:
                raise Refused(f"rule caption: min_{what} {least} and max_{what} {most} let no caption stay")

    def look(self, rows: pa.Table) -> pa.Table:
        said = [(caption or "").strip() for caption in rows["caption"].to_pylist()]
        characters, words = [len(one) for one in said], [len(one.split()) for one in said]
        return pa.table({"characters": pa.array(characters, pa.int32()), "words": pa.array(words, pa.int32())})

    def reject(self, looks: Iterable[pa.Table]) -> Iterator[np.ndarray]:
        for look in looks:
            characters, words = _numbers(look, "characters"), _numbers(look, "words")
            rejected = (characters < self.min_characters) | (words < self.min_words)
            if self.max_characters is not None:
                rejected |= characters > self.max_characters
            if self.max_words is not None:
                rejected |= words > self.max_words
            yield rejected


@dataclass(frozen=True)
class ExactDuplicates:
    """Rejects every picture whose bytes, as they were fetched, came before: the first of them stays.

    The caption does not count: what a model memorises is the picture, and a second caption for it is as often wrong as
    the first. Remembers 16 bytes of SHA-256 a picture (about 0.1 kB of memory).
    """

    rule: Literal["exact_duplicates"] = "exact_duplicates"
    columns: ClassVar[tuple[str, ...]] = ("sha256",)

    def look(self, rows: pa.Table) -> pa.Table:
        digests = [digest[:16] for digest in rows["sha256"].to_pylist()]
        return pa.table({"digest": pa.array(digests, pa.binary(16))})

    def reject(self, looks: Iterable[pa.Table]) -> Iterator[np.ndarray]:
        seen: set[bytes] = set()
        for look in looks:
            rejected = []
            for digest in look["digest"].to_pylist():
                rejected.append(digest in seen)
                seen.add(digest)
            yield np.array(rejected, bool)


@dataclass(frozen=True)
class ClipScore:
    """Rejects pairs whose picture and caption are far apart in CLIP's eyes: by a threshold, or all but a top fraction.

    The score is the cosine of image and text embedding. A threshold decides about each row alone; the top fraction is
    taken over all rows, so growth may change old selections and everything behind them. Of equal scores the first
    stay. A score that is not a number is the lowest.
    """

    min_score: float | None = None
    """Cosine, at least."""
    top_fraction: float | None = None
    """Fraction of rows that stay, rounded up."""
    rule: Literal["clip_score"] = "clip_score"
    columns: ClassVar[tuple[str, ...]] = ("score",)

    def __post_init__(self) -> None:
        if (self.min_score is None) == (self.top_fraction is None):
            raise Refused("rule clip_score: give either min_score (a cosine) or top_fraction")
        if self.min_score is not None and not -1 <= self.min_score <= 1:
            raise Refused(f"rule clip_score: min_score is {self.min_score}; a cosine lies between -1 and 1")
        if self.top_fraction is not None and not 0 < self.top_fraction <= 1:
            raise Refused(f"rule clip_score: top_fraction is {self.top_fraction}; it lies above 0, up to 1")

    def look(self, rows: pa.Table) -> pa.Table:
        return pa.table({"score": rows["score"].cast(pa.float32())})

    def reject(self, looks: Iterable[pa.Table]) -> Iterator[np.ndarray]:
        scores = (np.nan_to_num(_numbers(look, "score"), nan=-np.inf) for look in looks)
        if self.top_fraction is None:
            yield from (one < self.min_score for one in scores)
            return
        every = list(scores)
        joined = np.concatenate(every) if every else np.empty(0)
        stay = np.argsort(-joined, kind="stable")[: int(np.ceil(self.top_fraction * len(joined)))]
        rejected = np.ones(len(joined), bool)
        rejected[stay] = False
        yield from np.split(rejected, np.cumsum([len(one) for one in every])[:-1]) if every else ()


RULES: tuple[type, ...] = (Size, Aspect, Caption, ExactDuplicates, ClipScore)
"""Every rule that a recipe may name."""


def _numbers(look: pa.Table, column: str) -> np.ndarray:
    """A column as numbers [rows]; null becomes NaN, which no comparison accepts and none rejects."""
    return look[column].combine_chunks().to_numpy(zero_copy_only=False)
