"""Label columns of the source list, for what is told apart: found by uid in the index of each shard's download.

They are not in embed's rows: `source.columns.keep` carries a column into every index, and an embedding knows nothing of
it. So a label that is added later costs no embedding, and every row's label is its own whatever was filtered before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from infra.errors import Refused
from infra.records import UID, object_name
from infra.store import Store

MOST = 1 << 14
"""Classes of a label, at most: a column with more of them (a title, an id) is hardly meant as one."""
MISSING = -1
"""The class of a row that has no value in a label's column, though in another's."""


@dataclass(frozen=True)
class Labels:
    """Label columns and, once they are known, the classes of each."""

    columns: tuple[str, ...]
    classes: tuple[tuple[str, ...], ...] = ()


def read_labels(store: Store, index: str, columns: Sequence[str]) -> pa.Table:
    """uid and the label columns of those rows of an index object that have a value in any of them.

    A blank text is no value. Raises Refused for a column that is not there or holds neither text nor integers.
    """
    path = store.local(object_name(index))
    schema = pq.read_schema(path)
    for name in columns:
        if name not in schema.names:
            raise Refused(
                f"label {name!r}: the downloaded rows carry no such column. Name it in source.columns.keep, so that it "
                "travels with them."
            )
        kind = schema.field(name).type
        if not (pa.types.is_integer(kind) or is_text(kind) or pa.types.is_null(kind)):
            raise Refused(f"label {name!r} holds {kind}; classes are texts or integers")
    table = pq.read_table(path, columns=["uid", *columns])
    for place, name in enumerate(columns, 1):
        if is_text(table[name].type):
            blank = pc.equal(pc.utf8_trim_whitespace(table[name]), "")
            table = table.set_column(place, name, pc.if_else(blank, pa.scalar(None, table[name].type), table[name]))
    return table.filter(np.any([table[name].is_valid().to_numpy() for name in columns], axis=0))


def labelled(store: Store, index: str, columns: Sequence[str]) -> pa.Array:
    """uids of the rows of an index object that have a value in any of the columns."""
    return read_labels(store, index, columns)["uid"].combine_chunks()


def class_table(
    store: Store, kept: Iterable[tuple[str, Sequence[bytes]]], columns: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """The classes of each column that kept rows have, as text: integers by size, texts by their characters.

    kept: (index object, uids), those of one index in succession. Raises Refused for fewer than two classes or too many.
    """
    found: list[set[str | int]] = [set() for _ in columns]
    for index, group in groupby(kept, key=lambda pair: pair[0]):
        uids = pa.array([uid for _, chunk in group for uid in chunk], UID)
        table = read_labels(store, index, columns)
        table = table.filter(pc.is_in(table["uid"], value_set=uids))
        for values, name in zip(found, columns, strict=True):
            values.update(pc.unique(table[name].drop_null()).to_pylist())
    for values, name in zip(found, columns, strict=True):
        if not 2 <= len(values) <= MOST:
            raise Refused(
                f"label {name!r} has {len(values)} classes among the rows that are trained on; a classifier tells "
                f"between 2 and {MOST:,} apart"
            )
    return tuple(tuple(map(str, sorted(values))) for values in found)


class Reader:
    """The classes of an index's rows, as numbers."""

    def __init__(self, store: Store, index: str, labels: Labels) -> None:
        table = read_labels(store, index, labels.columns)
        numbers = [{value: number for number, value in enumerate(classes)} for classes in labels.classes]
        columns = [
            [MISSING if value is None else number.get(str(value), MISSING) for value in table[name].to_pylist()]
            for name, number in zip(labels.columns, numbers, strict=True)
        ]
        self._rows = dict(zip(table["uid"].to_pylist(), zip(*columns, strict=True), strict=True))

    def __call__(self, uids: Sequence[bytes]) -> Tensor:
        """int64 [rows, labels]: each row's class of each label, or `MISSING`."""
        return torch.tensor([self._rows[uid] for uid in uids], dtype=torch.long)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of that type holds text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
