"""Pairs of 64-bit hashes that differ in few bits, found without comparing all with all.

A hash is cut into `blocks` parts. Where two hashes differ in at most t bits, at most t parts differ, so at least
blocks − t are equal: for one of the C(blocks, t) choices of that many parts the two agree in all bits of it. So one
table a choice, with those bits as the key, has every such pair in one bucket (Manku, Jain, Das Sarma: "Detecting
Near-Duplicates for Web Crawling", WWW 2007, section 3). More blocks are more tables with longer keys, hence fewer
chance meetings: how many is chosen by the number of hashes, which keeps the work per hash nearly the same. What is
found does not depend on it, since every pair of a bucket is compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa

BITS = 64
MOST = 8
"""The largest distance that is searched; beyond it tables grow too many."""
_CROWDED = 64  # comparisons a hash: chance meetings need far fewer
_FEW = 1024  # hashes that are compared all with all if need be
_SORT, _COMPARE = 40.0, 40.0  # ns a hash and table, and a pair, on one core: only their ratio matters

Hashes = tuple[np.ndarray, np.ndarray]
"""uint64 [rows], and bool [rows]: whether there is one."""


def hashes(look: pa.Table, column: str = "phash") -> Hashes:
    """The hashes of a look, and which rows have one."""
    values = look[column].combine_chunks()
    return values.fill_null(0).to_numpy(zero_copy_only=False), np.asarray(values.is_valid())


def split(judge: Callable[..., np.ndarray], every: Sequence[Hashes], *more: object) -> Iterator[np.ndarray]:
    """Judges the hashes of all looks together; bool [rows] for each look, False where a row has no hash."""
    if not every:
        return
    there = np.concatenate([valid for _, valid in every])
    rejected = np.zeros(len(there), bool)
    rejected[there] = judge(np.concatenate([values[valid] for values, valid in every]), *more)
    yield from np.split(rejected, np.cumsum([len(valid) for _, valid in every])[:-1])


def repeats(values: np.ndarray, distance: int) -> np.ndarray:
    """bool [n]: which of uint64 [n] lie within `distance` bits of one before them that stays."""
    # What equals an earlier hash goes in any case: either that one stays, or both are near the one that sent it away.
    order = np.sort(np.unique(values, return_index=True)[1])
    rejected = np.ones(len(values), bool)
    rejected[order[_stay(values[order], distance)]] = False
    return rejected


def _stay(values: np.ndarray, distance: int) -> np.ndarray:
    """bool [n]: which of the distinct hashes uint64 [n] have none within the distance before them that stays.

    Where so many lie near each other that most comparisons would be of those that go, the first half is decided first,
    and what is near to those of it that stay is compared with nothing else.
    """
    half = len(values) // 2
    found = pairs(values, distance, _CROWDED * len(values) if half >= _FEW else math.inf)
    if found is not None:
        stays = np.ones(len(values), bool)
        for earlier, later in found:
            if stays[earlier]:
                stays[later] = False
        return stays
    first, second = values[:half], values[half:]
    stays = _stay(first, distance)
    undecided = ~near(second, first[stays], distance)
    undecided[undecided] = _stay(second[undecided], distance)
    return np.concatenate([stays, undecided])


def pairs(values: np.ndarray, distance: int, most: float = math.inf) -> list[tuple[int, int]] | None:
    """All (i, j), i < j, of uint64 [n] that differ in at most `distance` bits; by j, then by i, each once.

    None if more than `most` comparisons were needed.
    """
    count, found = np.uint64(len(values)), []
    for key, order in _tables(values, blocks(len(values), distance), distance):
        places, step = np.flatnonzero(key[1:] == key[:-1]), 1
        while len(places):  # each against the one `step` places behind it, as long as that is in its bucket
            most -= len(places)
            if most < 0:
                return None
            one, other = order[places], order[places + step]
            close = np.bitwise_count(values[one] ^ values[other]) <= distance
            found.append(other[close] * count + one[close])
            step += 1
            places = places[: np.searchsorted(places, len(values) - step)]
            places = places[key[places] == key[places + step]]
    if not found:
        return []
    later, earlier = np.divmod(np.unique(np.concatenate(found)), count)
    return list(zip(earlier.tolist(), later.tolist(), strict=True))


def near(values: np.ndarray, known: np.ndarray, distance: int) -> np.ndarray:
    """bool [n]: which of uint64 [n] lie within `distance` bits of one of `known`, uint64 [m]."""
    found = np.zeros(len(values), bool)
    known = np.unique(known)
    parts, width = blocks(len(known), distance), BITS - _index_bits(len(known))
    asked = keys(values, parts, distance, width)
    for (key, order), wanted in zip(_tables(known, parts, distance), asked, strict=True):
        rows = np.flatnonzero(~found)
        wanted = wanted[rows]
        places = np.searchsorted(key, wanted)
        while len(rows):  # each against the next one of its bucket, until there is none or one is near
            there = places < len(key)
            there[there] = key[places[there]] == wanted[there]
            rows, wanted, places = rows[there], wanted[there], places[there]
            close = np.bitwise_count(values[rows] ^ known[order[places]]) <= distance
            found[rows[close]] = True
            rows, wanted, places = rows[~close], wanted[~close], places[~close] + 1
    return found


def _tables(values: np.ndarray, parts: int, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each choice of parts the keys of uint64 [n], sorted, and whose they are; equal keys by index."""
    bits = _index_bits(len(values))
    index = np.arange(len(values), dtype=np.uint64)
    for key in keys(values, parts, distance, BITS - bits):
        table = np.sort(key << np.uint64(bits) | index)  # plain numbers: several times as fast as argsort
        yield table >> np.uint64(bits), table & np.uint64((1 << bits) - 1)


def _index_bits(count: int) -> int:
    return max(1, (count - 1).bit_length())


def blocks(count: int, distance: int) -> int:
    """How many parts to cut into: the fewest ns for that many hashes, if their bits were thrown like coins."""

    def cost(parts: int) -> float:
        meetings = count / 2 / 2 ** (BITS * (parts - distance) / parts)
        return math.comb(parts, distance) * (_SORT + _COMPARE * meetings)

    return min(range(distance + 1, distance + 7), key=cost)


def keys(values: np.ndarray, parts: int, distance: int, most: int) -> Iterator[np.ndarray]:
    """For each choice of parts − distance of the parts, their bits of uint64 [n] side by side, the last `most` of them.

    Two hashes that differ in at most `distance` bits have the same key in at least one of these.
    """
    bounds = [BITS * part // parts for part in range(parts + 1)]
    widths = [high - low for low, high in itertools.pairwise(bounds)]
    cut = [values >> np.uint64(low) & np.uint64((1 << width) - 1) for low, width in zip(bounds, widths, strict=False)]
    for chosen in itertools.combinations(range(parts), parts - distance):
        key = cut[chosen[0]]
        for part in chosen[1:]:
            key = key << np.uint64(widths[part]) | cut[part]
        yield key & np.uint64((1 << most) - 1)
