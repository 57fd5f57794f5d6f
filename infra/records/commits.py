"""Whether an action is done, and the commit that says so."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from infra.documents import digest_file
from infra.errors import Refused
from infra.records.damage import damaged, explain_damage
from infra.records.generations import lost_name, newest_generations
from infra.records.manifest import Action, Manifest, Record
from infra.records.objects import object_name, put_object

if TYPE_CHECKING:
    from infra.store import Store


def check_inputs(store: Store, action: Action) -> None:
    """Refused, code 5, naming the first input of an action that is missing or damaged, or the first file of a manifest
    among them: for whoever could not read them, and wants to know whether that is why."""
    for sha256 in action.inputs:
        files = [sha256]
        while files:
            one = files.pop(0)
            name = object_name(one)
            with explain_damage(name):
                if digest_file(store.local(name)) != one:
                    raise damaged(name, "is damaged: its SHA-256 is another")
            if one == sha256:
                with suppress(Refused):  # no manifest
                    records = Manifest.load(store, one).records
                    files += [file.sha256 for record in records for file in record.files.values()]


def current_record(store: Store, action: Action) -> Record | None:
    """The record of an action that holds, or None: it is to be done, or to be done again."""
    prefix = action.record_name().removesuffix("0.json")
    found = newest_generations(entry.name for entry in store.list(prefix)).get(action.key)
    return Record.from_json(store.get(found[1]), found[1]) if found else None


def commit(store: Store, action: Action, record: Record, out: Path) -> Record:
    """Puts the record's files, then the record itself; returns the record that won.

    It goes under its own generation, or behind those whose files were lost. Two runs may finish the same action: the
    first record stays, the other's copy is dropped. Raises Refused, code 5, before there is a record, if a file's
    object is damaged.
    """
    record.check()
    for name, file in record.files.items():
        put_object(store, file.sha256, out / name)
    while store.exists(lost_name(action.record_name(record.generation))):
        record = replace(record, generation=record.generation + 1)
    place = action.record_name(record.generation)
    if not store.put_new(place, record.to_json(action)):
        return current_record(store, action) or Record.from_json(store.get(place), place)
    for name, file in record.files.items():  # gc may have been about to remove one that lay there unused: see gc.py
        if not store.exists(object_name(file.sha256)):
            put_object(store, file.sha256, out / name)
    return record
