"""Which sample comes next: a pure function of (blocks, lanes, seed) and of the step, of nothing else.

Blocks are dealt to lanes without end: the blocks of epoch 0, shuffled, then those of epoch 1, shuffled anew, and so on;
lane m takes every lanes-th of them. Inside a lane the rows of a window of blocks are mixed. So a block is read for one
lane at a time, every row of the data comes up equally often, and a run's whole state of reading is the number of
samples it has seen: nothing here knows how many workers there are.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from infra.errors import Refused


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed out of labels and numbers, independent between any two different tuples."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def random_words(count: int, *seed: int | str) -> np.ndarray:
    """Random uint64 [count] from that seed: raw Philox words, which NumPy keeps the same for ever."""
    return np.random.Philox(key=derive_seed(*seed)).random_raw(count)


def shuffled(count: int, *seed: int | str) -> np.ndarray:
    """A permutation of range(count), int64 [count], from that seed; NumPy's own `permutation` may change."""
    return np.argsort(random_words(count, *seed), kind="stable")


@dataclass
class Walk:
    """How a lane's endless row of blocks falls into windows, as far as it was asked for.

    Window n has the blocks at the lane's places [cuts[n], cuts[n + 1]), and is the lane's rows [ends[n], ends[n + 1]).
    """

    cuts: list[int] = field(default_factory=lambda: [0])
    ends: list[int] = field(default_factory=lambda: [0])


@dataclass(frozen=True)
class Order:
    """The order of samples; `blocks[i]` is the number of rows that are kept of block i.

    A window is `window` blocks, whose rows are shuffled. With `spread` it is so many rows as `window` of the largest
    blocks have, out of as many blocks as that takes, and the rows of each block are spread evenly over it, so that
    neighbours come from different blocks; and an epoch ends with a window, where a lane has that many rows an epoch.
    """

    blocks: tuple[int, ...]
    lanes: int
    micro: int
    window: int
    seed: int
    spread: bool = False
    _epochs: OrderedDict[int, np.ndarray] = field(default_factory=OrderedDict, init=False, repr=False, compare=False)
    _walks: dict[int, Walk] = field(default_factory=dict, init=False, repr=False, compare=False)
    _windows: OrderedDict[tuple[int, int], np.ndarray] = field(
        default_factory=OrderedDict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not any(self.blocks):
            raise Refused("there is no row to train on: the selection rejects all of them. Loosen filter or curate.")
        if min(self.lanes, self.micro, self.window) < 1:
            raise Refused("an order needs at least one lane, one row a micro-batch and one block a window")

    @property
    def mixed(self) -> int:
        """Rows of a lane's window, about."""
        return self.window * max(self.blocks)

    def rows(self, step: int, lane: int) -> list[tuple[int, int]]:
        """The micro-batch of that lane at that step: `micro` pairs (block, row among the block's kept rows)."""
        first, last = step * self.micro, (step + 1) * self.micro
        walk = self._walked(lane, last)
        found: list[tuple[int, int]] = []
        while first < last:
            number = bisect_right(walk.ends, first) - 1
            start, stop = walk.ends[number], min(last, walk.ends[number + 1])
            taken = self._window(lane, number)[first - start : stop - start]
            found += [(block, row) for block, row in taken.tolist()]
            first = stop
        return found

    def window_of(self, step: int, lane: int) -> int:
        """The number of the lane's window in which the step begins."""
        first = step * self.micro
        return bisect_right(self._walked(lane, first + 1).ends, first) - 1

    def blocks_of(self, lane: int, number: int) -> list[int]:
        """The blocks of the lane's window of that number."""
        walk = self._walked(lane, 0)
        while len(walk.cuts) < number + 2:
            self._walk_on(lane, walk)
        return self._dealt(lane, walk.cuts[number], walk.cuts[number + 1]).tolist()

    def _walked(self, lane: int, rows: int) -> Walk:
        """The lane's windows, at least as far as its first rows lie in them."""
        walk = self._walks.setdefault(lane, Walk())
        while walk.ends[-1] < rows:
            self._walk_on(lane, walk)
        return walk

    def _walk_on(self, lane: int, walk: Walk) -> None:
        """Finds the lane's next windows, about an epoch of them: arithmetic alone, so that resuming late costs little.

        No window of `scatter_state` crosses the end of an epoch, or of as many as it takes for a lane to fill one.
        """
        place, count = walk.cuts[-1], len(self.blocks)
        if not self.spread:
            windows = max(1, count // (self.window * self.lanes))
            cuts = place + self.window * np.arange(windows + 1)
        else:
            epochs = -(-self.mixed * self.lanes // int(self._counts.sum()))
            chunk = (place * self.lanes + lane) // (epochs * count)
            cuts = np.array([place, -(-((chunk + 1) * epochs * count - lane) // self.lanes)])
        rows = np.append(0, self._counts[self._dealt(lane, place, int(cuts[-1]))].cumsum())
        if self.spread and rows[-1]:
            # As many windows as they hold rows, all of about one size: none is left with the last few blocks.
            windows = -(-int(rows[-1]) // self.mixed)
            inner = np.searchsorted(rows, np.arange(1, windows) * rows[-1] // windows)
            cuts = np.concatenate([cuts[:1], place + inner, cuts[1:]])
        walk.ends += (walk.ends[-1] + rows[cuts[1:] - place]).tolist()
        walk.cuts += cuts[1:].tolist()

    @cached_property
    def _counts(self) -> np.ndarray:
        return np.array(self.blocks, np.int64)

    def _dealt(self, lane: int, first: int, last: int) -> np.ndarray:
        """The blocks at the lane's places [first, last), int64."""
        epochs, places = np.divmod(np.arange(first, last) * self.lanes + lane, len(self.blocks))
        dealt = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            if epoch not in self._epochs:
                self._epochs[epoch] = shuffled(len(self.blocks), "epoch", self.seed, epoch)
                if len(self._epochs) > 4:
                    self._epochs.popitem(last=False)
            dealt[epochs == epoch] = self._epochs[epoch][places[epochs == epoch]]
        return dealt

    def _window(self, lane: int, number: int) -> np.ndarray:
        """(block, row) pairs of a window in the order in which they come, int64 [rows, 2]."""
        key = (lane, number)
        if key not in self._windows:
            cuts = self._walks[lane].cuts
            blocks = self._dealt(lane, cuts[number], cuts[number + 1])
            mix = spread_window if self.spread else shuffle_window
            self._windows[key] = mix(blocks, self._counts[blocks], self.seed, lane, number)
            if len(self._windows) > self.lanes + 1:
                self._windows.popitem(last=False)
        return self._windows[key]


def _all(blocks: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """All rows of those blocks, one block behind the other, int64 [rows, 2]."""
    starts = np.cumsum(counts) - counts
    return np.stack([np.repeat(blocks, counts), np.arange(counts.sum()) - np.repeat(starts, counts)], 1)


def shuffle_window(blocks: np.ndarray, counts: np.ndarray, *seed: int) -> np.ndarray:
    """A window's (block, row) pairs, shuffled; int64 [rows, 2]."""
    pairs = _all(blocks, counts)
    return pairs[shuffled(len(pairs), "window", *seed)]


def spread_window(blocks: np.ndarray, counts: np.ndarray, *seed: int) -> np.ndarray:
    """A window's (block, row) pairs, int64 [rows, 2], in rounds, in each of which a block has at most one row.

    A block's shuffled rows lie evenly apart, from a random phase on; the rows of a round are shuffled. Where a round
    would begin with the block that the last one ended with, its first two rows change places. (Drawn independently, two
    neighbours come from one of W blocks with probability 1/W, however many shards there are.)
    """
    pairs, total, entries = _all(blocks, counts), int(counts.sum()), np.repeat(np.arange(len(blocks)), counts)
    drawn = random_words(2 * total + len(blocks), "spread", *seed)
    turns = pairs[:, 1].copy()  # 0, 1, … within each block
    pairs = pairs[np.lexsort((drawn[:total], entries))]  # each block's rows shuffled, the blocks where they were
    phases = (drawn[2 * total :] >> np.uint64(11)) * 2.0**-53
    rounds = np.floor((turns + phases[entries]) * (counts.max() / counts[entries])).astype(np.int64)
    places = np.lexsort((drawn[total : 2 * total], rounds))
    pairs, rounds = pairs[places], rounds[places]
    starts = np.flatnonzero(np.diff(rounds)) + 1
    sizes = np.diff(starts, append=total)
    # In a round of two the change would only move the meeting to the round's other end.
    meeting = starts[(pairs[starts, 0] == pairs[starts - 1, 0]) & (sizes > 2)]
    pairs[meeting], pairs[meeting + 1] = pairs[meeting + 1], pairs[meeting]
    return pairs
