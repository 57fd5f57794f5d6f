"""Duplicates beside each other: for rows that a rule took as duplicates, the pictures that they are duplicates of.

What a rule compares (a digest, a hash, a direction) lies in its look, a few bytes a row. Of the few rows that are to be
shown it is read first; then all looks are gone through once, and held against these few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.concurrent import map_ordered
from infra.records import File, Manifest, columns
from infra.store import Store
from pipelines.reports.census import THREADS, Row
from pipelines.select import FEATURES

COMPARED = {"exact_duplicates": "digest", "near_duplicates": "phash", "semantic_duplicates": "direction"}
"""Rule → the column of its look that says what is alike."""
SHOWN = 4
"""Pictures of a group that are shown, at most."""


@dataclass
class Group:
    """A row that a rule took, and what is alike."""

    taken: Row
    value: Any
    alike: int = 0
    """Rows that are alike, itself included."""
    first: list[Row] = field(default_factory=list)
    """The first of them in manifest order, `SHOWN` at most, without the row itself."""


def groups(
    store: Store, looks: Manifest, rule: Mapping[str, Any], taken: Sequence[Row], threads: int = THREADS
) -> list[Group]:
    """A group for each of these rows that the rule (its settings, as in a recipe) took; the largest first."""
    column = f"{rule['rule']}.{COMPARED[rule['rule']]}"
    files = [record.files[FEATURES] for record in looks.records]
    found = []
    for row in taken:
        table = columns(store, files[row.shard], ["uid", column])
        mine = table.filter(pc.equal(table["uid"], pa.scalar(row.uid, table["uid"].type)))
        if mine.num_rows and mine[column][0].is_valid:
            found.append(Group(row, _values(mine[column])[0]))
    if found:
        read = partial(_matches, store, column, rule, found)
        for number, matches in enumerate(map_ordered(read, files, threads)):
            for group, uids in zip(found, matches, strict=True):
                group.alike += len(uids)
                others = (Row(0, number, uid) for uid in uids if (number, uid) != (group.taken.shard, group.taken.uid))
                group.first += list(others)[: SHOWN - 1 - len(group.first)]
    return sorted((one for one in found if one.first), key=lambda one: (-one.alike, one.taken))


def _matches(
    store: Store, column: str, rule: Mapping[str, Any], found: Sequence[Group], file: File
) -> list[list[bytes]]:
    """For each group, the uids of one look that are alike, in order."""
    table = columns(store, file, ["uid", column])
    table = table.filter(pc.is_valid(table[column]))
    if not table.num_rows:
        return [[] for _ in found]
    values, uids = _values(table[column]), table["uid"].combine_chunks()
    return [uids.filter(pa.array(_alike(rule, values, group.value))).to_pylist() for group in found]


def _alike(rule: Mapping[str, Any], values: np.ndarray, value: Any) -> np.ndarray:
    """bool [rows]: which values the rule would call a repeat of this one."""
    match rule["rule"]:
        case "near_duplicates":
            return np.bitwise_count(values ^ value) <= rule["max_distance"]
        case "semantic_duplicates":
            return values @ value >= rule["min_cosine"]
        case _:
            return values == value


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """A column of a look as an array: bytes [rows], uint64 [rows], or float32 [rows, width]."""
    whole = column.combine_chunks()
    if pa.types.is_fixed_size_list(whole.type):
        return np.asarray(whole.flatten(), np.float32).reshape(-1, whole.type.list_size)
    if pa.types.is_fixed_size_binary(whole.type):
        return np.array(whole.to_pylist(), dtype=object)
    return whole.to_numpy(zero_copy_only=False)
