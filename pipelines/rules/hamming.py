"""Pairs of 64-bit hashes that differ in few bits, found without comparing all with all.

A hash is cut into `blocks` parts. Where two hashes differ in at most t bits, at most t parts differ, so at least
blocks − t are equal: for one of the C(blocks, t) choices of that many parts the two agree in all bits of it. So one
table a choice, with those bits as the key, has every such pair in one bucket (Manku, Jain, Das Sarma: "Detecting
Near-Duplicates for Web Crawling", WWW 2007, section 3). More blocks are more tables with longer keys, hence fewer
chance meetings: how many is chosen by the number of hashes, which keeps the work per hash nearly the same. What is
found does not depend on it, since every pair of a bucket is compared.

A table is one sorted array of 64-bit words: the key, then further bits of the hash, then whose it is. So neighbours of
a bucket lie beside each other, and the further bits tell nearly all of them apart before a hash is looked up. Words are
built and compared a few thousand at a time, so that what is at hand stays in the processor's cache.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

BITS = 64
MOST = 8
"""The largest distance that is searched; beyond it tables grow too many."""
_CROWDED = 64  # comparisons a hash: chance meetings need far fewer
_FEW = 1024  # hashes that are compared all with all if need be
_SORT, _COMPARE = 25.0, 8.0  # ns a hash and table, and a pair, on one core: only their ratio matters
_AT_ONCE = 1 << 15  # hashes: 256 kB
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing

Hashes = tuple[np.ndarray, np.ndarray]
"""uint64 [rows], and bool [rows]: whether there is one."""


def hashes(look: pa.Table, column: str = "phash") -> Hashes:
    """The hashes of a look, and which rows have one."""
    values = look[column].combine_chunks()
    return values.fill_null(0).to_numpy(zero_copy_only=False), np.asarray(values.is_valid())


def split(judge: Callable[..., np.ndarray], every: Iterable[Hashes], *more: object) -> Iterator[np.ndarray]:
    """Judges the hashes of all looks together; bool [rows] for each look, False where a row has no hash."""
    values, valid = [], []
    for some, there in every:
        values.append(some[there])
        valid.append(there)
    if not valid:
        return
    joined = np.concatenate(values)
    values.clear()
    verdicts, at = judge(joined, *more), 0
    for there in valid:
        rejected, count = np.zeros(len(there), bool), int(np.count_nonzero(there))
        rejected[there] = verdicts[at : at + count]
        at += count
        yield rejected


def repeats(values: np.ndarray, distance: int) -> np.ndarray:
    """bool [n]: which of uint64 [n] lie within `distance` bits of one before them that stays."""
    # What equals an earlier hash goes in any case: either that one stays, or both are near the one that sent it away.
    rejected = ~_firsts(values)
    if rejected.any():
        rejected[~rejected] = ~_stay(values[~rejected], distance)
        return rejected
    return ~_stay(values, distance)


def _firsts(values: np.ndarray) -> np.ndarray:
    """bool [n]: which of uint64 [n] have no equal before them."""
    bits = np.uint64(_index_bits(len(values)))
    words = np.empty_like(values)
    for here in _chunks(len(values)):
        words[here] = values[here] * _MIX >> bits << bits | np.arange(here.start, here.stop, dtype=np.uint64)
    words.sort()
    # Equal hashes are among those whose words agree in all but the index; few others are.
    alike = np.zeros(len(values) + 1, bool)
    for here in _chunks(len(values) - 1):
        alike[1:-1][here] = (words[here] ^ words[1:][here]) >> bits == 0
    index = np.sort(words[alike[1:] | alike[:-1]] & ((np.uint64(1) << bits) - np.uint64(1)))
    firsts = np.ones(len(values), bool)
    firsts[index] = False
    firsts[index[np.unique(values[index], return_index=True)[1]]] = True
    return firsts


def _stay(values: np.ndarray, distance: int) -> np.ndarray:
    """bool [n]: which of the distinct hashes uint64 [n] have none within the distance before them that stays.

    Where so many lie near each other that most comparisons would be of those that go, the first half is decided first,
    and what is near to those of it that stay is compared with nothing else.
    """
    half = len(values) // 2
    found = pairs(values, distance, _CROWDED * len(values) if half >= _FEW else math.inf)
    if found is not None:
        stays = bytearray(b"\1") * len(values)
        for here in _chunks(len(found)):  # not all of them at once as Python's numbers
            for earlier, later in found[here].tolist():
                if stays[earlier]:
                    stays[later] = 0
        return np.frombuffer(stays, bool).copy()
    first, second = values[:half], values[half:]
    stays_first = _stay(first, distance)
    undecided = ~near(second, first[stays_first], distance)
    undecided[undecided] = _stay(second[undecided], distance)
    return np.concatenate([stays_first, undecided])


def pairs(values: np.ndarray, distance: int, most: float = math.inf) -> np.ndarray | None:
    """uint64 [pairs, 2]: all (i, j), i < j, of uint64 [n] that differ in at most `distance` bits; by j, then by i, each
    once. None if more than `most` comparisons were needed.
    """
    count, found = np.uint64(len(values)), [np.empty(0, np.uint64)]
    for table in tables(len(values), blocks(len(values), distance), distance):
        words = table.sorted(values)
        for here in _chunks(len(values) - 1):
            apart, step = words[here] ^ words[1:][here], 1
            places = np.flatnonzero(apart < table.bucket) + here.start
            apart = apart[places - here.start]
            while len(places):  # each against the one `step` places behind it, as long as that is in its bucket
                most -= len(places)
                if most < 0:
                    return None
                hit = places[np.bitwise_count(apart >> table.bits) <= distance]
                one, other = words[hit] & table.index, words[hit + step] & table.index
                close = np.bitwise_count(values[one] ^ values[other]) <= distance
                one, other = one[close], other[close]
                found.append(np.maximum(one, other) * count + np.minimum(one, other))
                step += 1
                places = places[: np.searchsorted(places, len(values) - step)]
                apart = words[places] ^ words[places + step]
                inside = apart < table.bucket
                places, apart = places[inside], apart[inside]
    later, earlier = np.divmod(np.unique(np.concatenate(found)), max(count, np.uint64(1)))
    return np.stack([earlier, later], 1)


def near(values: np.ndarray, known: np.ndarray, distance: int) -> np.ndarray:
    """bool [n]: which of uint64 [n] lie within `distance` bits of one of `known`, uint64 [m]."""
    found = np.zeros(len(values), bool)
    known = np.unique(known)
    for table in tables(len(known), blocks(len(known), distance), distance):
        words = table.sorted(known)
        for here in _chunks(len(values)):
            rows = np.flatnonzero(~found[here]) + here.start
            wanted = table.key(values[rows])
            places = np.searchsorted(words, wanted)
            while len(rows):  # each against the next one of its bucket, until there is none or one is near
                there = places < len(words)
                there[there] = words[places[there]] ^ wanted[there] < table.bucket
                rows, wanted, places = rows[there], wanted[there], places[there]
                close = np.bitwise_count(values[rows] ^ known[words[places] & table.index]) <= distance
                found[rows[close]] = True
                rows, wanted, places = rows[~close], wanted[~close], places[~close] + 1
    return found


@dataclass(frozen=True)
class Table:
    """How one table writes a hash: the key in the highest bits of a word, then `more` bits of the hash from bit `start`
    on (in a circle), and the index in the lowest `bits`."""

    key_parts: tuple[tuple[int, int], ...]
    """(lowest bit, how many) of the parts that make the key."""
    start: int
    more: int
    bits: np.uint64

    @property
    def bucket(self) -> np.uint64:
        """Two words whose XOR is below this have the same key."""
        return np.uint64(1 << (BITS - self._width))

    @property
    def index(self) -> np.uint64:
        """Mask of the index."""
        return (np.uint64(1) << self.bits) - np.uint64(1)

    @property
    def _width(self) -> int:
        """Bits of the key; the last ones, where a long index leaves no room for all."""
        return min(sum(width for _, width in self.key_parts), BITS - int(self.bits))

    def key(self, values: np.ndarray) -> np.ndarray:
        """The words' highest bits, for uint64 [n]: two hashes of one key may be near each other."""
        made = np.zeros_like(values)
        for low, width in self.key_parts:
            made = made << np.uint64(width) | values >> np.uint64(low) & np.uint64((1 << width) - 1)
        return made << np.uint64(BITS - self._width)

    def sorted(self, values: np.ndarray) -> np.ndarray:
        """uint64 [n], rising: the words of uint64 [n]."""
        words = np.empty_like(values)
        for here in _chunks(len(values)):
            some = values[here]
            word = self.key(some)
            if self.more:
                end = (self.start + self.more) % BITS
                turned = some << np.uint64(BITS - end) | some >> np.uint64(end) if end else some
                word |= turned >> np.uint64(BITS - self.more) << np.uint64(BITS - self._width - self.more)
            words[here] = word | np.arange(here.start, here.stop, dtype=np.uint64)
        words.sort()  # plain numbers: several times as fast as argsort
        return words


def tables(count: int, parts: int, distance: int) -> Iterator[Table]:
    """A table for each choice of parts − distance of the parts. Two hashes that differ in at most `distance` bits have
    the same key in at least one of them."""
    bounds = [BITS * part // parts for part in range(parts + 1)]
    bits = _index_bits(count)
    for chosen in itertools.combinations(range(parts), parts - distance):
        key_parts = tuple((bounds[part], bounds[part + 1] - bounds[part]) for part in chosen)
        around = zip(chosen, [*chosen[1:], chosen[0]], strict=True)
        # Further bits: the longest run that is not in the key. Its bits alone tell hashes of one bucket apart.
        run, start = max(((bounds[after] - bounds[part + 1]) % BITS, bounds[part + 1] % BITS) for part, after in around)
        free = BITS - bits - sum(width for _, width in key_parts)
        yield Table(key_parts, start, max(0, min(free, run)), np.uint64(bits))


def _chunks(count: int) -> Iterator[slice]:
    """Ranges that fit into the processor's cache."""
    for start in range(0, count, _AT_ONCE):
        yield slice(start, min(count, start + _AT_ONCE))


def _index_bits(count: int) -> int:
    return max(1, (count - 1).bit_length())


def blocks(count: int, distance: int) -> int:
    """How many parts to cut into: the fewest ns for that many hashes, if their bits were thrown like coins."""

    def cost(parts: int) -> float:
        meetings = count / 2 / 2 ** (BITS * (parts - distance) / parts)
        return math.comb(parts, distance) * (_SORT + _COMPARE * meetings)

    return min(range(distance + 1, distance + 7), key=cost)
