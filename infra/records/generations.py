"""Which record of an action holds: the newest generation of its key, unless its files are lost. Names alone, no store.

A record is never overwritten. What supersedes it is the next generation of its key: the same shard without samples that
were forgotten, or what was made anew after its files were lost. A loss is noted beside the record,
    records/<stage>-<version>/<spec digest>/<key>.<generation>.lost.json
so that the action counts as not done, and a manifest that still lists the lost generation is not taken for the new one.
"""

from __future__ import annotations

from collections.abc import Iterable

_RECORD, _LOST = ".json", ".lost.json"


def split_name(name: str) -> tuple[str, int, bool]:
    """A name below records/ → (key, generation, whether it is the note of a loss)."""
    last = name.rpartition("/")[2]
    lost = last.endswith(_LOST)
    key, _, generation = last.removesuffix(_LOST if lost else _RECORD).partition(".")
    return key, int(generation), lost


def lost_name(record: str) -> str:
    """Where it is noted that the files of the record of that name are lost."""
    return record.removesuffix(_RECORD) + _LOST


def newest_generations(names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Names of records and losses → key → (generation, name) of the records that hold."""
    records: dict[str, tuple[int, str]] = {}
    lost: set[tuple[str, int]] = set()
    for name in names:
        key, generation, loss = split_name(name)
        if loss:
            lost.add((key, generation))
        elif generation >= records.get(key, (-1, ""))[0]:
            records[key] = (generation, name)
    return {key: found for key, found in records.items() if (key, found[0]) not in lost}
