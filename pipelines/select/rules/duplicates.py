"""Rules about rows that say again what a row before them said."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from pipelines.select.rules.base import PHASH, BaseRule
from pipelines.select.rules.digests import repeated
from pipelines.select.rules.hamming import MOST, hashes, repeats, split
from unclip.config import Range


@dataclass(frozen=True, kw_only=True)
class ExactDuplicates(BaseRule):
    """Rejects every picture whose bytes, as they were fetched, came before: the first of them stays.

    The caption does not count: what a model memorises is the picture, and a second caption for it is as often wrong as
    the first. 16 bytes of SHA-256 are compared; they wait on disk (24 bytes a row in $TMPDIR) and one byte a row in
    memory, beside what digests.py holds of one part at a time.
    """

    rule: Literal["exact_duplicates"] = "exact_duplicates"
    columns: ClassVar[tuple[str, ...]] = ("sha256",)

    def features(self, rows: pa.Table) -> pa.Table:
        digests = [digest[:16] for digest in rows["sha256"].to_pylist()]
        return pa.table({"digest": pa.array(digests, pa.binary(16))})

    def reject(self, looks: Iterable[pa.Table]) -> Iterator[np.ndarray]:
        yield from repeated(_digests(look) for look in looks)


@dataclass(frozen=True, kw_only=True)
class NearDuplicates(BaseRule):
    """Rejects every picture that looks nearly as one that stays and came before it: the first of them stays.

    Two pictures look nearly the same where their perceptual hashes (64 bits, see picture.phash) differ in at most
    `max_distance` bits: the same picture in another size, encoding or quality differs in 0 to 4, others in about 32.
    Pictures of one colour have nearly equal hashes, so put `blank` first. A picture that cannot be decoded stays, for
    embed to tell. Exact (hamming.py): no pair is missed. Holds 9 bytes a row, and while it searches
    29, and 16 for each near pair.
    """

    max_distance: int = 4
    """Bits of 64 that may differ."""
    rule: Literal["near_duplicates"] = "near_duplicates"
    columns: ClassVar[tuple[str, ...]] = (PHASH,)
    bounds: ClassVar[Mapping[str, Range]] = {"max_distance": Range(0, MOST)}

    def features(self, rows: pa.Table) -> pa.Table:
        return pa.table({"phash": rows[PHASH]})

    def reject(self, looks: Iterable[pa.Table]) -> Iterator[np.ndarray]:
        yield from split(repeats, map(hashes, looks), self.max_distance)


def _digests(look: pa.Table) -> np.ndarray:
    """uint64 [rows, 2] of a look's digests."""
    column = look["digest"].combine_chunks()
    if not len(column):
        return np.empty((0, 2), np.uint64)
    return np.frombuffer(column.buffers()[1], np.uint64).reshape(-1, 2)[column.offset :][: len(column)]
