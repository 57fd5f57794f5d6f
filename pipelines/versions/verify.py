"""Recomputes every digest of a store, names what is wrong, and marks it to be made anew if asked.

Objects are read in pieces by some threads, so memory is bounded by them; what several versions share is read once.
Mending removes what is damaged and notes that the records which name it no longer hold: the next
run does those actions again, and commits them as the next generation of their keys. Nothing that is whole is touched.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

from infra.concurrent import map_unordered
from infra.documents import SCHEMA_VERSION, canonical, digest
from infra.errors import NotFound, Refused
from infra.records import (
    Manifest,
    Record,
    document,
    lost_name,
    newest_generations,
    object_name,
    removed_objects,
    split_name,
)
from infra.store import Store

THREADS = 8
PIECE = 8 << 20
"""Bytes that are read at a time."""

Told = Callable[[int, int], None]
"""Hears how many bytes were checked, and how many there are."""


class Trouble(StrEnum):
    """What can be wrong with a name."""

    MISSING = "missing"
    DAMAGED = "damaged"


MEND = {
    "objects": "put a copy back from a backup; or --mend, and run again: what it belongs to is made anew",
    "records": "--mend removes it, and the next run does that action again",
    "manifests": "--mend removes it, and the next run writes it anew",
}
"""First part of a name → what to do about it."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was put."""

    name: str
    """Of the store."""
    trouble: Trouble
    where: str
    """Whose it is, for a person: "embed/1 3f2a…: rows.parquet of shard 12"."""
    mend: str


@dataclass
class Verified:
    """What was looked at, and what of it is wrong."""

    count: Counter[str] = field(default_factory=Counter)
    """objects, records, manifests → how many were looked at."""
    bytes: int = 0
    forgotten: int = 0
    """Objects that are gone because they held forgotten samples."""
    lost: int = 0
    """Objects that are gone, and whose records were marked: they are made anew, or were, as other bytes."""
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class _Wanted:
    """An object that is referred to: how large it is (None: not said), and by whom."""

    bytes: int | None
    where: str


def verify(store: Store, versions: Sequence[str] = (), *, told: Told = lambda *_: None) -> Verified:
    """Checks those versions (first digits of each), or the whole store; Refused for a version that there is not."""
    out = Verified()
    wanted: dict[str, _Wanted] = {}
    bodies = _bodies(store, versions, out)
    for version, stage in bodies.items():
        wanted.setdefault(version, _Wanted(None, f"{stage} {version[:12]}: the manifest's body"))
        with suppress(Refused):  # missing or damaged, which is found below
            for number, record in enumerate(Manifest.load(store, version).records):
                for path, file in record.files.items():
                    where = f"{stage} {version[:12]}: {path} of shard {number}"
                    wanted.setdefault(file.sha256, _Wanted(file.bytes, where))
    if not versions:
        for name, record in _records(store, out):
            for path, file in record.files.items():
                wanted.setdefault(file.sha256, _Wanted(file.bytes, f"{path} of {name}"))
    _objects(store, wanted, out, told)
    return out


def _bodies(store: Store, versions: Sequence[str], out: Verified) -> dict[str, str]:
    """Version → stage, of every head, or of those that are asked for; notes heads that cannot be read."""
    found: dict[str, str] = {}
    unmatched = set(versions)
    for entry in store.list("manifests/"):
        version = entry.name.rpartition("/")[2].partition(".")[0]
        asked = {one for one in versions if one and version.startswith(one.lower())}
        if versions and not asked:
            continue
        unmatched -= asked
        out.count["manifests"] += 1
        found[version] = entry.name.split("/")[1].replace("-", "/")
        try:
            head = document(store, entry.name)
            found[version] = head["action"]["stage"]
            if head["version"] != version or not isinstance(head["records"], list):
                raise ValueError
        except (Refused, ValueError, KeyError, TypeError, NotFound):
            out.findings.append(Finding(entry.name, Trouble.DAMAGED, f"head of {version[:12]}", MEND["manifests"]))
    if unmatched:
        named = ", ".join(sorted(map(repr, unmatched)))
        raise Refused(f"there is no version {named} in {store.uri}; `unclip data ls` lists those that there are")
    return found


def _records(store: Store, out: Verified) -> Iterator[tuple[str, Record]]:
    """Records that hold and can be read; notes the others."""
    names = [name for _, name in newest_generations(entry.name for entry in store.list("records/")).values()]

    def read(name: str) -> tuple[str, Record | None]:
        with suppress(Refused, NotFound):
            record = Record.from_json(store.get(name), name)
            if name.rpartition("/")[2].startswith(f"{record.key}.{record.generation}."):
                return name, record
        return name, None

    for _, (name, record) in map_unordered(read, names, THREADS):
        out.count["records"] += 1
        if record is None:
            out.findings.append(Finding(name, Trouble.DAMAGED, "a record", MEND["records"]))
        else:
            yield name, record


def _objects(store: Store, wanted: dict[str, _Wanted], out: Verified, told: Told) -> None:
    """Reads every object and compares."""
    gone, lost = removed_objects(store), set(_lost(store))
    if lost:  # what was lost once and made anew may be lost once more
        lost -= {file.sha256 for _, record in _records(store, Verified()) for file in record.files.values()}
    total = sum(one.bytes or 0 for one in wanted.values())

    def check(sha256: str) -> tuple[str, int, Trouble | None]:
        done, trouble = _checked(store, sha256)
        return sha256, done, trouble

    for _, (sha256, done, trouble) in map_unordered(check, sorted(wanted), THREADS):
        out.count["objects"] += 1
        out.bytes += done
        told(out.bytes, max(total, out.bytes))
        if trouble is Trouble.MISSING and sha256 in gone:
            out.forgotten += 1
        elif trouble is Trouble.MISSING and sha256 in lost:
            out.lost += 1
        elif trouble:
            out.findings.append(Finding(object_name(sha256), trouble, wanted[sha256].where, MEND["objects"]))


def _checked(store: Store, sha256: str) -> tuple[int, Trouble | None]:
    """Bytes of an object, and what is wrong with it."""
    total, at, name = hashlib.sha256(), 0, object_name(sha256)
    try:
        while piece := store.get(name, at, PIECE):
            total.update(piece)
            at += len(piece)
            if len(piece) < PIECE:
                break
    except NotFound:
        return 0, Trouble.MISSING
    except OSError:  # a disk that cannot read it
        return at, Trouble.DAMAGED
    return at, None if total.hexdigest() == sha256 else Trouble.DAMAGED


def _lost(store: Store) -> Iterator[str]:
    """SHA-256s of the objects whose loss was noted."""
    for entry in store.list("records/"):
        if split_name(entry.name)[2]:
            yield from document(store, entry.name)["objects"]


def mend(store: Store, found: Verified) -> dict[str, int]:
    """Removes what is damaged and marks the records whose files are gone; returns stage → actions to be done again.

    A manifest's body is put together again from its records, where these are whole. First come the marks, then the
    removals: a process that is killed in between has lost nothing, and the same command goes on.
    """
    objects = {one.name.rpartition("/")[2] for one in found.findings if one.name.startswith("objects/")}
    names = [entry.name for entry in store.list("records/")]
    again: Counter[str] = Counter()
    for _, name in newest_generations(names).values() if objects else ():
        with suppress(Refused):  # it is damaged itself, and removed below
            files = Record.from_json(store.get(name), name).files.values()
            if hit := sorted(objects & {file.sha256 for file in files}):
                lose(store, name, hit)
                again[name.split("/")[1]] += 1
    for one in found.findings:
        store.delete(one.name)
        if one.name.startswith("records/"):
            again[one.name.split("/")[1]] += 1
    records = {split_name(name)[:2]: name for name in names if not split_name(name)[2]}
    for entry in list(store.list("manifests/")):
        version = entry.name.rpartition("/")[2].partition(".")[0]
        if version in objects and not _rebuilt(store, entry.name, version, records):
            store.delete(entry.name)  # it lists nothing any more; the next run that makes this version writes it anew
    return dict(again)


def lose(store: Store, record: str, objects: Sequence[str] = ()) -> None:
    """Notes that the record of that name no longer holds, since these objects of it are gone."""
    said = {"schema_version": SCHEMA_VERSION, "objects": list(objects)}
    store.put_new(lost_name(record), canonical(said))


def _rebuilt(store: Store, head: str, version: str, records: dict[tuple[str, int], str]) -> bool:
    """Whether the body of a manifest is there again: its lines are what its records say."""
    if store.exists(object_name(version)):  # by another head of the same version
        return True
    with suppress(Refused, KeyError, NotFound):
        names = [records[key, generation] for key, generation in document(store, head)["records"]]
        body = b"".join(canonical(Record.from_json(store.get(name), name).content) + b"\n" for name in names)
        if digest(body) == version:
            return store.put_new(object_name(version), body)
    return False
