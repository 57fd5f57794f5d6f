"""Which sample comes next: a pure function of (blocks, lanes, seed) and of the step, of nothing else.

Blocks are dealt to lanes without end: the blocks of epoch 0, shuffled, then those of epoch 1, shuffled anew, and so on;
lane m takes every lanes-th of them. Inside a lane the rows of `window` blocks are shuffled together. So a block is
read for one lane at a time, every row of the data comes up equally often, and a run's whole state of reading is the
number of samples it has seen: nothing here knows how many workers there are.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from infra.errors import Refused


def derived(*parts: int | str) -> int:
    """A 63-bit seed out of labels and numbers, independent between any two different tuples."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def shuffled(count: int, *seed: int | str) -> np.ndarray:
    """A permutation of range(count), int64 [count], from that seed.

    Sorting raw Philox words, which NumPy keeps the same for ever, where its `permutation` may change.
    """
    return np.argsort(np.random.Philox(key=derived(*seed)).random_raw(count), kind="stable")


@dataclass(frozen=True)
class Order:
    """The order of samples; `blocks[i]` is the number of rows that are kept of block i."""

    blocks: tuple[int, ...]
    lanes: int
    micro: int
    window: int
    seed: int
    _epochs: OrderedDict[int, np.ndarray] = field(default_factory=OrderedDict, init=False, repr=False, compare=False)
    _ends: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _windows: OrderedDict[tuple[int, int], np.ndarray] = field(
        default_factory=OrderedDict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not any(self.blocks):
            raise Refused("there is no row to train on: the selection rejects all of them. Loosen filter or curate.")
        if min(self.lanes, self.micro, self.window) < 1:
            raise Refused("an order needs at least one lane, one row a micro-batch and one block a window")

    def rows(self, step: int, lane: int) -> list[tuple[int, int]]:
        """The micro-batch of that lane at that step: `micro` pairs (block, row among the block's kept rows)."""
        first, last = step * self.micro, (step + 1) * self.micro
        ends = self._ends.setdefault(lane, [0])
        while ends[-1] < last:
            number = len(ends) - 1
            ends.append(ends[-1] + sum(self.blocks[block] for block in self._blocks(lane, number)))
        found: list[tuple[int, int]] = []
        while first < last:
            number = bisect_right(ends, first) - 1
            stop = min(last, ends[number + 1])
            taken = self._window(lane, number)[first - ends[number] : stop - ends[number]]
            found += [(int(block), int(row)) for block, row in taken]
            first = stop
        return found

    def _blocks(self, lane: int, number: int) -> list[int]:
        """The blocks of a lane's window."""
        dealt = range(number * self.window, (number + 1) * self.window)
        return [self._dealt(turn * self.lanes + lane) for turn in dealt]

    def _dealt(self, place: int) -> int:
        """The block at a place of the endless row of epochs."""
        epoch, place = divmod(place, len(self.blocks))
        if epoch not in self._epochs:
            self._epochs[epoch] = shuffled(len(self.blocks), "epoch", self.seed, epoch)
            if len(self._epochs) > 4:
                self._epochs.popitem(last=False)
        return int(self._epochs[epoch][place])

    def _window(self, lane: int, number: int) -> np.ndarray:
        """(block, row) pairs of a window in shuffled order, int64 [rows, 2]."""
        key = (lane, number)
        if key not in self._windows:
            blocks = self._blocks(lane, number)
            counts = [self.blocks[block] for block in blocks]
            pairs = np.stack([np.repeat(blocks, counts), np.concatenate([np.arange(count) for count in counts])], 1)
            self._windows[key] = pairs[shuffled(len(pairs), "window", self.seed, lane, number)]
            if len(self._windows) > self.lanes + 1:
                self._windows.popitem(last=False)
        return self._windows[key]
