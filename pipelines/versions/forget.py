"""Takes samples out of the data for good: opt-outs and legal requests, named by URL, uid or SHA-256 of the picture.

In this order, so that a process that is killed anywhere leaves nothing that the same command does not finish:
1. The names join the store's list (infra/records/forgotten.py). From here on no download fetches or keeps them.
2. Each downloaded shard that holds one is written anew without it, as the next generation of its key; the row stays in
   the index, as `forgotten`, so that every account of rows adds up. Objects that held it are noted as buried first.
3. Records made from buried objects that hold the sample too (embeddings, looks, reports that show it) are removed with
   their files: the next run makes them from the new shard, and whatever is behind them.
4. The buried objects are removed.
What is left: the list that a person gave, and the slices cut from it, still name the URL, since they say which row it
is that is not to be fetched; models that were trained on it, whose releases are named; and copies outside of the store
(backups, caches of other machines).

A run that fetches such a sample at this very moment looks at the list before it commits. One that looked a moment
before step 1 and commits after step 2 is found by the next round, or when the command is given again. Files that a
killed run put and never recorded are gc's to remove. A run that reads the removed objects meanwhile fails, and goes on
from the new shards when it is given again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.concurrent import map_unordered
from infra.errors import NotFound, Refused
from infra.records import (
    FORGOTTEN,
    SALT,
    Action,
    Forgotten,
    ForgottenNames,
    Manifest,
    Record,
    add_request,
    commit,
    document,
    explain_damage,
    mark_removed,
    newest_generations,
    object_name,
    read_object,
    read_requests,
    removed_objects,
    url_salt,
)
from infra.store import Store
from pipelines.download import TABLE, TAR, redact_tar, shard_record
from pipelines.promote import view_root
from pipelines.release import bundles
from pipelines.reports import names_samples

DOWNLOADS = "records/download-"
ROUNDS = 3
THREADS = 8

Told = Callable[[str, int, int], None]
"""Hears what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Trained:
    """A release that was trained on forgotten samples."""

    release: str
    """Version of the bundle."""
    name: str
    """Its model line."""
    samples: int
    """How many of them."""


@dataclass
class Account:
    """What was forgotten, or would be."""

    samples: int = 0
    """Rows that hold or held what was named, over all lists and settings."""
    shards: int = 0
    """Downloaded shards that were written anew."""
    derived: int = 0
    """Records behind them that were removed, for the next run to make anew."""
    objects: int = 0
    """Files that were removed."""
    trained: list[Trained] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """Releases whose data is no longer in the store, so that nobody can say."""


def names_of(
    urls: tuple[str, ...] = (), uids: tuple[str, ...] = (), pictures: tuple[str, ...] = (), file: Path | None = None
) -> ForgottenNames:
    """What a person named; Refused for what is none. A line of a file is a URL, or 32 (uid) or 64 (SHA-256) digits."""
    found: dict[str, list[str]] = {"--url": list(urls), "--uid": list(uids), "--sha256": list(pictures)}
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(f"--file {file} cannot be read ({error})") from error
        for number, line in enumerate(map(str.strip, lines), 1):
            if not line:
                continue
            kind = "--url" if "://" in line else {32: "--uid", 64: "--sha256"}.get(len(line))
            if kind is None:
                raise Refused(f"--file {file}, line {number}: {line!r} is no URL, no uid and no SHA-256")
            found[kind].append(line)
    for url in found["--url"]:
        if "://" not in url:
            raise Refused(
                f"--url {url!r} is no URL; write it as it stands in the list, such as https://…. A picture of a tar or "
                "a folder is named by the --sha256 of its bytes, or by its --uid"
            )
    names = ForgottenNames(
        frozenset(_hex("--uid", one, 16) for one in found["--uid"]),
        frozenset(url.strip() for url in found["--url"]),
        frozenset(_hex("--sha256", one, 32) for one in found["--sha256"]),
    )
    return names


def _hex(option: str, text: str, size: int) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != size:
        raise Refused(f"{option} {text!r} is none: it has {2 * size} hex digits, as in the index of a shard")
    return value


def forget(store: Store, names: ForgottenNames, *, dry: bool = False, told: Told = lambda *_: None) -> Account:
    """Forgets what is named, and whatever of the list is still in the data; says what was done, or (dry) would be."""
    # A dry run writes nothing: where there is no salt yet, there is no list either, and any will do.
    salt = url_salt(store) if not dry or store.exists(SALT) else b""
    asked = Forgotten.of(names, salt)
    account, uids = Account(), set[bytes](asked.uids)
    for _ in range(1 if dry else ROUNDS):
        touched = list(_touched(store, Forgotten.load(store).plus(asked), told))
        uids |= {uid for one in touched for uid in one.uids}
        asked = asked.plus(Forgotten(uids=frozenset(uids)))  # by which it can be said later what was trained on them
        if not dry:
            add_request(store, asked)
        known, held = Forgotten.load(store).plus(asked), removed_objects(store)
        for done, one in enumerate(touched, 1):
            held |= _renewed(store, one.record, known, dry)
            told("shards", done, len(touched))
        derived = _derived(store, held, known, told)
        account.samples += sum(len(one.uids) for one in touched)
        account.shards += len(touched)
        account.derived += len(derived.records)
        account.objects += _remove(store, derived, known, told, dry)
        if not touched:
            break
    uids |= {uid for one in read_requests(store) if one.meets(asked) for uid in one.uids}
    _trained(store, frozenset(uids), derived.held, account)
    return account


@dataclass(frozen=True)
class _Touched:
    """A downloaded shard that holds what is to be forgotten: its record's name, and the uids of those rows."""

    record: str
    uids: tuple[bytes, ...]


def _touched(store: Store, known: Forgotten, told: Told) -> Iterator[_Touched]:
    """Downloaded shards, of every setting and list, that hold what is in the list."""
    standing = (
        [name for _, name in newest_generations(entry.name for entry in store.list(DOWNLOADS)).values()]
        if known
        else []
    )

    def look(name: str) -> _Touched:
        record = Record.from_json(store.get(name), name)
        index, gone = _rows(store, record, known)
        return _Touched(name, tuple(index.filter(gone)["uid"].to_pylist()))

    for done, (_, one) in enumerate(map_unordered(look, standing, THREADS), 1):
        told("looking", done, len(standing))
        if one.uids:
            yield one


def _rows(store: Store, record: Record, known: Forgotten) -> tuple[pa.Table, np.ndarray]:
    """The index of a shard, and which of its rows are still to be forgotten."""
    name = object_name(record.sha(TABLE))
    with explain_damage(name), pq.ParquetFile(store.local(name)) as file:
        index = file.read()
    left = pc.not_equal(index["state"], FORGOTTEN).to_numpy(zero_copy_only=False).astype(bool)
    return index, known.among(index) & left


def _renewed(store: Store, name: str, known: Forgotten, dry: bool) -> set[str]:
    """Buries what held them of a shard and commits its next generation; returns the SHA-256s that are buried."""
    record, asked = Record.from_json(store.get(name), name), document(store, name)["action"]
    action = Action(asked["stage"], asked["spec"], tuple(asked["inputs"]))
    index, gone = _rows(store, record, known)
    files = {file.sha256 for file in record.files.values()}
    if dry:
        pictures = pc.is_valid(index["offset"]).to_numpy(zero_copy_only=False).astype(bool) & gone
        return files if pictures.any() else {record.sha(TABLE)}
    with store.scratch() as out:
        index = redact_tar(store.local(object_name(record.sha(TAR))), index, gone, out / TAR)
        made = shard_record(action, index, out, record.generation + 1)
        files -= {file.sha256 for file in made.files.values()}
        mark_removed(store, files)
        commit(store, action, made, out)
    return files


@dataclass(frozen=True)
class _Derived:
    """What was made from objects that are to go and holds the sample as well."""

    records: list[str]
    held: set[str]
    """SHA-256s of all that is to go, those objects included."""
    named: set[str]
    """Of these, what another record that holds still names."""


def _derived(store: Store, held: set[str], known: Forgotten, told: Told) -> _Derived:
    """Follows these objects through the records that read them, as far as the sample is found in what was made."""
    listed = (entry.name for entry in store.list("records/"))
    standing = (
        [name for _, name in newest_generations(listed).values() if not name.startswith(DOWNLOADS)] if held else []
    )
    made: dict[str, dict[str, str]] = {}
    readers: dict[str, list[str]] = {}

    def read(name: str) -> tuple[str, dict[str, Any]]:
        with explain_damage(name):
            return name, document(store, name)

    for done, (_, (name, said)) in enumerate(map_unordered(read, standing, THREADS), 1):
        told("records", done, len(standing))
        made[name] = {file["sha256"]: path for path, file in said["files"].items()}
        for sha256 in said["action"]["inputs"]:
            readers.setdefault(sha256, []).append(name)
    records, all_held, fresh = list[str](), set(held), set(held)
    pages = {name for name, files in made.items() if any(path.endswith(".html") for path in files.values())}
    while fresh:  # looks and embeddings, then what was made from these
        found = set[str]()
        for name in sorted((pages | {name for one in fresh for name in readers.get(one, ())}) & made.keys()):
            if objects := {sha for sha, path in made[name].items() if _holds(store, sha, path, known)}:
                del made[name]
                records.append(name)
                found |= objects
        fresh = found - all_held
        all_held |= found
    return _Derived(records, all_held, {sha256 for shas in made.values() for sha256 in shas} & all_held)


def _holds(store: Store, sha256: str, path: str, known: Forgotten) -> bool:
    """Whether a file tells more of a forgotten sample than its uid and what became of it."""
    try:
        if path.endswith(".html"):
            return names_samples(store.get(object_name(sha256)), known.uids)
        if not path.endswith(".parquet"):
            return False
        with pq.ParquetFile(store.local(object_name(sha256))) as file:
            if "uid" not in file.schema_arrow.names or {*file.schema_arrow.names} <= {"uid", "rule", "state"}:
                return False
            return bool(known.among(file.read(["uid"])).any())
    except NotFound:  # removed before this process was killed, and its record was not
        return True


def _remove(store: Store, derived: _Derived, known: Forgotten, told: Told, dry: bool) -> int:
    """Buries and removes objects, the records of what was made from them first; returns how many objects there were."""
    gone = sorted(derived.held - derived.named)
    if not dry:
        mark_removed(store, derived.held - removed_objects(store))
        for name in derived.records:
            store.delete(name)
        for page in view_root(store).glob("*/*.html"):  # copies for people; the next run makes them again
            if names_samples(page.read_bytes(), known.uids):
                page.unlink()
    there = 0
    for done, sha256 in enumerate(gone, 1):
        told("removing", done, len(gone))
        if store.exists(object_name(sha256)):
            there += 1
            if not dry:
                store.delete(object_name(sha256))
    return there


def _trained(store: Store, uids: frozenset[bytes], held: set[str], account: Account) -> None:
    """Releases whose selections let those samples stay. Selections hold uids alone, and are not removed."""
    known = Forgotten(uids=uids)
    for version in bundles(store) if uids else ():
        try:
            release = json.loads(read_object(store, Manifest.load(store, version, "bundle").only.sha("release.json")))
            stages = ["curate"]
            if _is_trained(store, release["data"].get("clip", "")):  # it learns from what filter lets stay
                stages.append("filter")
            seen = set[bytes]()
            for stage in stages:
                for name, file in Manifest.load(store, release["data"][stage], stage).only.files.items():
                    if name.removesuffix(".parquet") in held:
                        table = pq.read_table(store.local(object_name(file.sha256)))
                        stays = table.filter(pc.is_null(table["rule"]))
                        seen |= {*stays.filter(known.among(stays))["uid"].to_pylist()}
        except (Refused, KeyError, NotFound):
            account.unknown.append(version)
            continue
        if seen:
            account.trained.append(Trained(version, release["name"], len(seen)))


def _is_trained(store: Store, clip: str) -> bool:
    """Whether that version of `clip` was trained here, and not loaded."""
    heads = [entry.name for entry in store.list("manifests/clip-") if f"/{clip}." in entry.name]
    return any(document(store, name)["action"]["inputs"] for name in heads)
