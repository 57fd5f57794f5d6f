"""Pairs of 64-bit hashes that differ in few bits, found without comparing all with all.

A hash is cut into parts, and the parts fall into groups. Where two hashes differ in at most t bits, at most t parts
differ; of t + 1 + groups · (k − 1) parts, more than groups · (k − 1) are then equal, so that some group has k of them.
So one table for each choice of k parts of one group, with those bits as the key, has every such pair in one bucket
(with a single group: Manku, Jain, Das Sarma: "Detecting Near-Duplicates for Web Crawling", WWW 2007, section 3). More
tables have longer keys, hence fewer chance meetings: which it shall be is chosen by the number of hashes. What is found
does not depend on it, since every pair of a bucket is compared.

A table is one sorted array of 64-bit words: the key, then further bits of the hash, then whose it is. So neighbours of
a bucket lie beside each other, and the further bits tell nearly all of them apart before a hash is looked up. Words are
built and compared in pieces, of each word half its bits, so that what is at hand stays in the processor's cache.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa

BITS = 64
MOST = 8
"""The largest distance that is searched; beyond it tables grow too many."""
_CROWDED = 64  # comparisons a hash: chance meetings need far fewer
_FEW = 1024  # hashes that are compared all with all if need be
_SORT, _COMPARE = 17.0, 3.0  # ns a hash and table, and a pair, on one core: only their ratio matters
_TELLING = 24  # bits of a hash that tell those of one key apart: 1 in 1300 by chance for a distance of 4
_DENSE = 32  # where more than one word in so many meets another, all are compared, whether they meet or not
_AT_ONCE = 1 << 16  # hashes: 512 kB, or half that
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
            for earlier, later in zip(found[here, 0].tolist(), found[here, 1].tolist(), strict=True):
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
    bits = np.uint64(_index_bits(len(values)))
    found = [np.empty(0, np.uint64)]
    words, telling = np.empty_like(values), np.empty(len(values), np.uint32)  # once: new pages cost as much as sorting
    for table in tables(len(values), scheme(len(values), distance)):
        table.write(values, words)
        words.sort()  # plain numbers: several times as fast as argsort
        table.tell(words, telling)
        for here in _chunks(len(values) - 1):
            met, places, others = _close(telling, here, table, distance, most)
            most -= met
            if most < 0:
                return None
            one, other = words[places] & table.index, words[others] & table.index
            found.append(np.maximum(one, other) << bits | np.minimum(one, other))
    both = np.sort(np.concatenate(found))  # np.unique hashes, which takes several times as long
    both = both[np.flatnonzero(np.diff(both, prepend=~both[:1]))]  # a pair may meet in several tables
    pair = np.stack([both & ((np.uint64(1) << bits) - np.uint64(1)), both >> bits], 1)
    return pair[np.bitwise_count(values[pair[:, 0]] ^ values[pair[:, 1]]) <= distance]


def _close(
    telling: np.ndarray, here: slice, table: Table, distance: int, most: float
) -> tuple[int, np.ndarray, np.ndarray]:
    """How many comparisons there are of these words with those behind them in their buckets, and, int64 [pairs] each,
    the places of those that may be near from what the words tell. Gives up beyond `most` comparisons."""
    met, step, meeting, many = 0, 0, table.meeting, True
    places, others = list[np.ndarray](), list[np.ndarray]()
    while many and met <= most:  # all with those `step` places behind them, whether they meet or not
        step += 1
        end = max(here.start, min(here.stop, len(telling) - step))
        apart = telling[here.start : end] ^ telling[here.start + step : end + step]
        places.append((np.bitwise_count(apart) <= distance).nonzero()[0] + here.start)
        others.append(places[-1] + step)
        inside = apart < meeting
        count = int(np.count_nonzero(inside))
        met += count
        many = count * _DENSE > len(inside)
    at = np.flatnonzero(inside) + here.start
    while len(at) and met <= most:  # those alone that met one
        step += 1
        at = at[: np.searchsorted(at, len(telling) - step)]
        apart = telling[at] ^ telling[at + step]
        inside = apart < meeting
        at, apart = at[inside], apart[inside]
        met += len(at)
        places.append(at[np.bitwise_count(apart) <= distance])
        others.append(places[-1] + step)
    return met, np.concatenate(places), np.concatenate(others)


def near(values: np.ndarray, known: np.ndarray, distance: int) -> np.ndarray:
    """bool [n]: which of uint64 [n] lie within `distance` bits of one of `known`, uint64 [m]."""
    found = np.zeros(len(values), bool)
    known = np.unique(known)
    words = np.empty_like(known)
    for table in tables(len(known), scheme(len(known), distance)):
        table.write(known, words)
        words.sort()
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
    """How one table writes a hash: some of its bits, of which the highest are the key, above the index."""

    pieces: tuple[tuple[int, int], ...]
    """(lowest bit in the hash, how many) of the bits, from the highest of a word on; what has no room is left out."""
    width: int
    """Bits of the key."""
    bits: np.uint64
    """Those of the index."""

    @property
    def bucket(self) -> np.uint64:
        """Two words whose XOR is below this have the same key."""
        return np.uint64(1 << (BITS - self.width))

    @property
    def meeting(self) -> np.uint32:
        """Two words of one key tell numbers whose XOR is below this; those of other keys seldom do."""
        return np.uint32(self.bucket >> self._told)

    @property
    def _told(self) -> np.uint64:
        """The lowest bit of a word that `reporting_to` keeps."""
        return np.uint64(max(int(self.bits), BITS - self.width - _TELLING))

    @property
    def index(self) -> np.uint64:
        """Mask of the index."""
        return (np.uint64(1) << self.bits) - np.uint64(1)

    def key(self, values: np.ndarray) -> np.ndarray:
        """The words' highest bits, for uint64 [n]: two hashes of one key may be near each other."""
        return self._highest(values, self.width)

    def write(self, values: np.ndarray, words: np.ndarray) -> None:
        """The words of uint64 [n], in their order, into uint64 [n]."""
        for here in _chunks(len(values)):
            index = np.arange(here.start, here.stop, dtype=np.uint64)
            np.bitwise_or(self._highest(values[here], BITS - int(self.bits)), index, out=words[here])

    def tell(self, words: np.ndarray, telling: np.ndarray) -> None:
        """Of uint64 [n] words, the last bits of the key and the next `_TELLING` behind it, into uint32 [n]: these take
        half the time to compare."""
        for here in _chunks(len(words)):
            np.right_shift(words[here], self._told, out=telling[here], casting="unsafe")

    def _highest(self, values: np.ndarray, room: int) -> np.ndarray:
        """So many bits of the words."""
        made, moved, at = np.zeros_like(values), np.empty_like(values), BITS
        for low, width in self.pieces:
            take = min(width, at - (BITS - room))
            if take == 0:
                break
            low, at = low + width - take, at - take
            if at >= low:
                np.left_shift(values, np.uint64(at - low), out=moved)
            else:
                np.right_shift(values, np.uint64(low - at), out=moved)
            moved &= np.uint64((1 << at + take) - (1 << at))
            made |= moved
        return made


def tables(count: int, scheme: Scheme) -> Iterator[Table]:
    """The tables of a scheme for that many hashes."""
    bounds = [BITS * part // scheme.parts for part in range(scheme.parts + 1)]
    bits = _index_bits(count)
    for chosen in scheme.choices():
        # Further bits: the longest run that is not in the key, downwards in a circle from one of its parts, which is
        # then the lowest of the key, so that both are moved together. They alone tell hashes of one bucket apart.
        around = zip([chosen[-1], *chosen[:-1]], chosen, strict=True)
        run, lowest = max(((bounds[part] - bounds[before + 1]) % BITS, part) for before, part in around)
        key = [(bounds[part], bounds[part + 1] - bounds[part]) for part in reversed(chosen) if part != lowest]
        key.append((bounds[lowest], bounds[lowest + 1] - bounds[lowest]))
        below = min(run, bounds[lowest])
        more = [(bounds[lowest] - below, below), (BITS - (run - below), run - below)]
        width = min(sum(width for _, width in key), BITS - bits)
        yield Table(_joined(key + more), width, np.uint64(bits))


def _joined(pieces: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges of bits, (lowest, how many), those that follow each other downwards as one."""
    joined: list[tuple[int, int]] = []
    for low, width in pieces:
        if joined and low + width == joined[-1][0]:
            joined[-1] = (low, joined[-1][1] + width)
        elif width:
            joined.append((low, width))
    return tuple(joined)


def _chunks(count: int) -> Iterator[slice]:
    """Ranges that fit into the processor's cache."""
    for start in range(0, count, _AT_ONCE):
        yield slice(start, min(count, start + _AT_ONCE))


def _index_bits(count: int) -> int:
    return max(1, (count - 1).bit_length())


@dataclass(frozen=True)
class Scheme:
    """Into how many parts a hash is cut for a distance, in how many groups, and how many parts of one make a key."""

    distance: int
    groups: int
    key: int

    @property
    def parts(self) -> int:
        """So many that, where `distance` of them differ, `key` parts of some group do not."""
        return self.distance + 1 + self.groups * (self.key - 1)

    def choices(self) -> list[tuple[int, ...]]:
        """The parts of each key, rising; parts are dealt to the groups in turn."""
        groups = (range(group, self.parts, self.groups) for group in range(self.groups))
        return [chosen for group in groups for chosen in itertools.combinations(group, self.key)]


def scheme(count: int, distance: int) -> Scheme:
    """The fewest ns for that many hashes, if their bits were thrown like coins."""

    def cost(one: Scheme) -> float:
        meetings = count / 2 / 2 ** (BITS * one.key / one.parts)
        return len(one.choices()) * (_SORT + _COMPARE * meetings)

    return min(schemes(distance), key=cost)


@cache
def schemes(distance: int) -> tuple[Scheme, ...]:
    """Those to choose from: a single group with keys of up to six parts, and more groups with keys of two."""
    single = (Scheme(distance, 1, key) for key in range(1, 7))
    return (*single, *(Scheme(distance, groups, 2) for groups in range(2, distance + 1)))
