"""Rows a second of the filter's reduce at 10 k, 100 k and 1 M rows: a row of a long list takes under twice the time.

Near duplicates want more tables for more rows (5 at 10 k, 9 at 1 M), and these no longer lie in the processor's cache.
Comparing all with all would take a hundred times as long per row.

Run with `make bench`. Looks are made up, in shards of 10,000 rows; a tenth of the hashes lie within the threshold of
another. Medians of repeats where a repeat is short.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from pipelines.select.rules import (
    BlockedTerms,
    Caption,
    ExactDuplicates,
    NearDuplicates,
    Rule,
    SemanticDuplicates,
    Size,
)
from pipelines.select.stage import decide

ROWS = (10_000, 100_000, 1_000_000)
SHARD = 10_000
CASES: dict[str, tuple[float, tuple[Rule, ...]]] = {
    "exact_duplicates": (2, (ExactDuplicates(),)),
    "near_duplicates": (2, (NearDuplicates(),)),
    "size, caption, blocked_terms, exact and near duplicates": (
        2, (Size(min_side=64), Caption(), BlockedTerms(terms=("blocked",)), ExactDuplicates(), NearDuplicates()),
    ),
}  # fmt: skip
"""Rules, and the most that the time per row may grow by."""


@dataclass(frozen=True)
class InMemory:
    """A look that is in memory already, so that reading files is not what is timed."""

    table: pa.Table

    @property
    def rows(self) -> int:
        return self.table.num_rows

    def part(self, rule: str) -> pa.Table:
        names = [name for name in self.table.column_names if name.startswith(f"{rule}.")]
        return self.table.select(names).rename_columns([name.removeprefix(f"{rule}.") for name in names])


def looks(count: int) -> Iterator[pa.Table]:
    """What the rules look at, of that many rows."""
    random = np.random.default_rng(0)
    hashes = random.integers(2**64, size=count, dtype=np.uint64)
    near = np.flatnonzero(random.random(count) < 0.1)
    flips = [np.uint64(1) << random.integers(64, size=len(near), dtype=np.uint64) for _ in range(3)]
    hashes[near] = hashes[random.integers(count, size=len(near))] ^ flips[0] ^ flips[1] ^ flips[2]
    digests = random.integers(count * 9 // 10 or 1, size=count).astype("<u8")
    for at in range(0, count, SHARD):
        here = slice(at, at + SHARD)
        rows = len(digests[here])
        packed = np.zeros((rows, 2), "<u8")
        packed[:, 0] = digests[here]
        yield pa.table(
            {
                "near_duplicates.phash": hashes[here],
                "exact_duplicates.digest": pa.FixedSizeBinaryArray.from_buffers(
                    pa.binary(16), rows, [None, pa.py_buffer(packed.tobytes())]
                ),
                "size.side": random.integers(32, 512, rows).astype(np.int32),
                "caption.characters": random.integers(0, 99, rows).astype(np.int32),
                "caption.words": random.integers(0, 20, rows).astype(np.int32),
                "blocked_terms.blocked": random.random(rows) < 0.01,
            }
        )


@pytest.mark.parametrize("name", CASES)
def test_the_time_per_row_hardly_grows_with_the_rows(name: str) -> None:
    most, rules = CASES[name]
    per_row = {}
    for rows in ROWS:
        made, took = list(looks(rows)), []
        for _ in range(5 if rows < ROWS[-1] else 3):
            began = time.process_time()
            rejected = sum(int(np.count_nonzero(marks >= 0)) for _, marks in decide(rules, map(InMemory, made)))
            took.append(time.process_time() - began)
        per_row[rows] = statistics.median(took) / rows
        print(f"\n{name}: {1 / per_row[rows]:,.0f} rows/s at {rows:,} rows ({rejected:,} rejected)", end="")
    growth = max(per_row.values()) / per_row[ROWS[0]]
    print(f"\n{name}: time per row × {growth:.2f}", end="")
    assert growth < most


def test_blocked_terms_cost_the_same_however_many_there_are() -> None:
    captions = pa.table({"caption": ["a red circle left of a small green square on the beach"] * 5000})
    seconds = {}
    for count in (10, 10_000):
        rule = BlockedTerms(terms=tuple(f"term{number} again" for number in range(count)))
        rule.features(captions.slice(0, 1))
        took = []
        for _ in range(3):
            began = time.process_time()
            rule.features(captions)
            took.append(time.process_time() - began)
        seconds[count] = statistics.median(took)
        print(f"\nblocked_terms: {5000 / seconds[count]:,.0f} captions/s with {count:,} terms", end="")
    assert seconds[10_000] < 2 * seconds[10]


def crowd(count: int) -> pa.Table:
    """Hashes that nearly all lie near each other, as those of pale pictures of nothing do."""
    random = np.random.default_rng(0)
    bits = np.uint64(1) << random.integers(64, size=(4, count), dtype=np.uint64)
    return pa.table({"near_duplicates.phash": np.bitwise_or.reduce(bits, axis=0)})


def directions(count: int) -> pa.Table:
    """Embeddings of 64 dimensions around a tenth as many centres."""
    random = np.random.default_rng(0)
    made = random.normal(size=(count // 10, 64))[random.integers(count // 10, size=count)]
    made += 0.05 * random.normal(size=made.shape)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    flat = pa.array(made.astype(np.float16).reshape(-1))
    return pa.table({"semantic_duplicates.direction": pa.FixedSizeListArray.from_arrays(flat, 64)})


@pytest.mark.parametrize(("name", "make"), [("near_duplicates", crowd), ("semantic_duplicates", directions)])
def test_crowds_and_clusters_take_time_in_proportion_to_the_rows(name: str, make: Callable[[int], pa.Table]) -> None:
    """From 10 k to 100 k rows, a cluster for 1000; a crowd takes its logarithm more."""
    per_row = {}
    for rows in ROWS[:2]:
        rule = NearDuplicates() if make is crowd else SemanticDuplicates(min_cosine=0.95, clusters=rows // 1000)
        made = make(rows)
        began = time.process_time()
        rejected = sum(int(np.count_nonzero(marks >= 0)) for _, marks in decide((rule,), [InMemory(made)]))
        per_row[rows] = (time.process_time() - began) / rows
        speed = f"{1 / per_row[rows]:,.0f} rows/s at {rows:,} rows"
        print(f"\n{name} ({make.__name__}): {speed} ({rejected:,} rejected)", end="")
    assert per_row[ROWS[1]] < 2 * per_row[ROWS[0]]
