"""Rules about rows that say again what a row before them said."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from pipelines.rules.base import PHASH, BaseRule
from pipelines.rules.hamming import MOST, hashes, repeats, split
from unclip.config import Range


@dataclass(frozen=True, kw_only=True)
class ExactDuplicates(BaseRule):
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


@dataclass(frozen=True, kw_only=True)
class NearDuplicates(BaseRule):
    """Rejects every picture that looks nearly as one that stays and came before it: the first of them stays.

    Two pictures look nearly the same where their perceptual hashes (64 bits, see picture.phash) differ in at most
    `max_distance` bits: the same picture in another size, encoding or quality differs in 0 to 4, others in about 32.
    Pictures of one colour have nearly equal hashes, so put `blank` first. A picture that cannot be decoded stays, for
    embed to tell. Exact (pipelines/rules/hamming.py): no pair is missed. Holds 8 bytes a row, and while it searches
    about 120.
    """

    max_distance: int = 4
    """Bits of 64 that may differ."""
    rule: Literal["near_duplicates"] = "near_duplicates"
    columns: ClassVar[tuple[str, ...]] = (PHASH,)
    bounds: ClassVar[Mapping[str, Range]] = {"max_distance": Range(0, MOST)}

    def look(self, rows: pa.Table) -> pa.Table:
        return pa.table({"phash": rows[PHASH]})

    def reject(self, looks: Iterable[pa.Table]) -> Iterator[np.ndarray]:
        every = [hashes(look) for look in looks]
        yield from split(repeats, every, self.max_distance)
