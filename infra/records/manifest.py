"""Actions, records and manifests: what is to be made, what was made, and the versions of data.

An action's *key* is known before the work (the digest of stage, spec and the contents it reads); a record's files carry
their SHA-256, known after it. Keys are made of contents, never of keys, so an input made anew with the same bytes
changes nothing behind it. A record is written last and never overwritten: it is the commit.

In the store:
    objects/<aa>/<sha256>                                  every file of every record, and manifest bodies
    records/<stage>-<version>/<spec digest>/<key>.<generation>.json    the newest generation holds: generations.py
    manifests/<stage>-<version>/<spec digest>/<version>.<key, 16 digits>.json    heads; the body is object <version>
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import Refused
from infra.records.damage import damaged, reading
from infra.records.generations import lost_name, newest
from infra.store.base import NotFound

if TYPE_CHECKING:
    from infra.store.base import Store

SCHEMA_VERSION = 1


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical(document: Any) -> bytes:
    """The one JSON text of a document: sorted keys, no spaces, UTF-8, no NaN. Equal documents give equal bytes."""
    return _CANONICAL.encode(document).encode()


def digest(data: bytes) -> str:
    """SHA-256 of bytes, in hex (64 characters)."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex, read in bounded memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_schema(document: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the document; raises Refused where its `schema_version` is not the one that this release reads."""
    found = document.get("schema_version")
    if found != SCHEMA_VERSION:
        raise Refused(
            f"{where} has schema version {found!r}, and this unclip reads version {SCHEMA_VERSION}. "
            "Use the unclip that wrote it, or a new store."
        )
    return document


def document(store: Store, name: str) -> dict[str, Any]:
    """The JSON document of that name; Refused where it is missing, damaged, or of an unknown schema version."""
    with reading(name):
        return check_schema(json.loads(store.get(name)), name)


@dataclass(frozen=True)
class File:
    """A file of a record: its SHA-256 (hex) and its size in bytes. It lies at `object_name(sha256)`."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Block:
    """The trainer's unit of reading: rows [first, first + rows) of the Parquet file `file` of a record.

    For rows that lie in Parquet a block is one row group; for pictures in tars, a range of the tar's index.
    """

    file: str
    first: int
    rows: int


_block = lru_cache(1 << 14)(Block)  # shards are cut alike: ten thousand of them need not hold forty thousand blocks


@dataclass(frozen=True)
class Action:
    """A piece of work, named before it is done: stage ("embed/1"), spec (plain JSON), and the SHA-256s it reads."""

    stage: str
    spec: dict[str, Any]
    inputs: tuple[str, ...]

    @cached_property
    def document(self) -> dict[str, Any]:
        """The JSON whose digest is the key; it is stored in the record, so "why anew?" is a diff of two of them."""
        return {"stage": self.stage, "spec": self.spec, "inputs": list(self.inputs)}

    @cached_property
    def key(self) -> str:
        """SHA-256 of the canonical JSON of stage, spec and inputs."""
        return digest(canonical(self.document))

    @cached_property
    def place(self) -> str:
        """`<stage>-<version>/<spec digest>`: the folder that this action shares with its siblings."""
        return f"{self.stage.replace('/', '-')}/{digest(canonical(self.spec))[:16]}"

    def record_name(self, generation: int = 0) -> str:
        """Where this action's record of that generation lies in the store."""
        return f"records/{self.place}/{self.key}.{generation}.json"


@dataclass(frozen=True)
class Record:
    """What an action made. rows = the sum of states, or the action failed (`check`)."""

    key: str
    generation: int
    files: dict[str, File]
    rows: int = 0
    states: dict[str, int] = field(default_factory=dict)
    blocks: tuple[Block, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        action: Action,
        out: Path,
        *,
        states: dict[str, int] | None = None,
        blocks: Iterable[Block] = (),
        facts: dict[str, Any] | None = None,
        generation: int = 0,
    ) -> Record:
        """The record of every file below `out`; rows is the sum of states."""
        files = {
            path.relative_to(out).as_posix(): File(digest_file(path), path.stat().st_size)
            for path in sorted(out.rglob("*"))
            if path.is_file()
        }
        counted = {state: count for state, count in sorted((states or {}).items()) if count}
        return cls(action.key, generation, files, sum(counted.values()), counted, tuple(blocks), facts or {})

    @property
    def content(self) -> dict[str, Any]:
        """What was made, without how it was asked for: this is what the manifest's version digests."""
        # Not dataclasses.asdict, which copies leaf by leaf: a manifest may have ten thousand records.
        return {
            "files": {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in self.files.items()},
            "rows": self.rows,
            "states": self.states,
            "blocks": [{"file": block.file, "first": block.first, "rows": block.rows} for block in self.blocks],
            "facts": self.facts,
        }

    def check(self) -> Record:
        """Returns itself; raises Refused if rows do not reconcile with states."""
        if self.rows != sum(self.states.values()):
            raise Refused(
                f"record {self.key[:12]}: {self.rows} rows went in, and its states add up to "
                f"{sum(self.states.values())} ({self.states}). This is a defect of the stage; please report it.",
                code=5,
            )
        return self

    @classmethod
    def from_content(cls, content: dict[str, Any], key: str = "", generation: int = 0) -> Record:
        """The inverse of `content`."""
        return cls(
            key,
            generation,
            {name: File(**file) for name, file in content["files"].items()},
            content["rows"],
            content["states"],
            tuple(_block(**block) for block in content["blocks"]),
            content["facts"],
        )

    def to_json(self, action: Action) -> bytes:
        """The stored document: schema, action, key, generation and content."""
        return canonical(
            {
                "schema_version": SCHEMA_VERSION,
                "action": action.document,
                "key": self.key,
                "generation": self.generation,
                **self.content,
            }
        )

    @classmethod
    def from_json(cls, data: bytes, where: str = "record") -> Record:
        """Reads `to_json`'s bytes; raises Refused for an unknown schema version, and where they are damaged."""
        with reading(where):
            document = check_schema(json.loads(data), where)
            if digest(canonical(document["action"])) != document["key"]:
                raise ValueError("its key is not its action's")
            return cls.from_content(document, document["key"], document["generation"]).check()

    def sha(self, name: str) -> str:
        """SHA-256 of one of its files; KeyError names the files that there are."""
        if name not in self.files:
            raise KeyError(f"record {self.key[:12]} has no file {name!r}, only {sorted(self.files)}")
        return self.files[name].sha256


@dataclass(frozen=True)
class Manifest:
    """An ordered, immutable list of records: one version of one stage's output.

    `version` digests the contents alone (the body: one canonical JSON line a record). A manifest loaded by version has
    contents and empty keys; keys, which say how it was asked for, are in the head.
    """

    action: Action
    records: tuple[Record, ...]

    @cached_property
    def body(self) -> bytes:
        """One canonical JSON line a record. Its SHA-256 is the version."""
        return b"".join(canonical(record.content) + b"\n" for record in self.records)

    @cached_property
    def version(self) -> str:
        """SHA-256 of the body: the version of the data."""
        return digest(self.body)

    @property
    def rows(self) -> int:
        """Rows of all records."""
        return sum(record.rows for record in self.records)

    @property
    def states(self) -> dict[str, int]:
        """States of all records, added up."""
        total: dict[str, int] = {}
        for record in self.records:
            for state, count in record.states.items():
                total[state] = total.get(state, 0) + count
        return dict(sorted(total.items()))

    @property
    def only(self) -> Record:
        """The one record of a reduce, a fit, an evaluation or a bundle."""
        if len(self.records) != 1:
            raise Refused(f"{self.action.stage} has {len(self.records)} records where one was expected", code=5)
        return self.records[0]

    def save(self, store: Store) -> str:
        """Writes body and head, and returns the version. Writing the same manifest twice changes nothing.

        Raises Refused, code 5, if the body's name holds other bytes.
        """
        put_object(store, self.version, self.body)
        head = {
            "schema_version": SCHEMA_VERSION,
            "action": self.action.document,
            "version": self.version,
            "records": [[record.key, record.generation] for record in self.records],
            "rows": self.rows,
            "states": self.states,
        }
        store.put_new(f"manifests/{self.action.place}/{self.version}.{self.action.key[:16]}.json", canonical(head))
        return self.version

    @classmethod
    def load(cls, store: Store, version: str, stage: str = "") -> Manifest:
        """The manifest of that version, from its body alone (keys are empty); Refused if that is missing or damaged."""
        name, anew = object_name(version), "Put it back from a backup, or delete what is there and run again."
        try:
            body = store.get(name)
        except NotFound as error:
            raise damaged(name, f"is missing: it lists version {version[:12]} of the data", anew) from error
        if digest(body) != version:
            raise damaged(name, "is damaged: its SHA-256 is another", anew)
        with reading(name):
            records = tuple(Record.from_content(json.loads(line)) for line in body.splitlines())
        found = cls(Action(stage, {}, ()), records)
        found.__dict__.update(body=body, version=version)  # known: they need not be made from the records again
        return found

    def asked_as(self, action: Action, keys: Iterable[tuple[str, int]]) -> Manifest:
        """The same contents, loaded by version, as that action asks for them: with the key and generation of each."""
        pairs = zip(keys, self.records, strict=True)
        whole = Manifest(
            action, tuple(replace(one, key=key, generation=generation) for (key, generation), one in pairs)
        )
        whole.__dict__.update(body=self.body, version=self.version)
        return whole


def object_name(sha256: str) -> str:
    """Where the object of that SHA-256 lies."""
    return f"objects/{sha256[:2]}/{sha256}"


def read_object(store: Store, sha256: str) -> bytes:
    """The bytes of that SHA-256, for what is small; Refused, code 5, where they are missing or others."""
    name = object_name(sha256)
    with reading(name):
        data = store.get(name)
    if digest(data) != sha256:
        raise damaged(name, "is damaged: its SHA-256 is another")
    return data


def check_inputs(store: Store, action: Action) -> None:
    """Refused, code 5, naming the first input of an action that is missing or damaged, or the first file of a manifest
    among them: for whoever could not read them, and wants to know whether that is why."""
    for sha256 in action.inputs:
        files = [sha256]
        while files:
            one = files.pop(0)
            name = object_name(one)
            with reading(name):
                if digest_file(store.local(name)) != one:
                    raise damaged(name, "is damaged: its SHA-256 is another")
            if one == sha256:
                with suppress(Refused):  # no manifest
                    records = Manifest.load(store, one).records
                    files += [file.sha256 for record in records for file in record.files.values()]


def put_object(store: Store, sha256: str, data: bytes | Path) -> None:
    """Puts the bytes of that SHA-256; raises Refused, code 5, if others lie under its name, which are damaged."""
    if not store.put_new(object_name(sha256), data):
        raise Refused(f"{object_name(sha256)} in store {store.uri} is damaged: delete it and run again", code=5)


def standing(store: Store, action: Action) -> Record | None:
    """The record of an action that holds, or None: it is to be done, or to be done again."""
    prefix = action.record_name().removesuffix("0.json")
    found = newest(entry.name for entry in store.list(prefix)).get(action.key)
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
        return standing(store, action) or Record.from_json(store.get(place), place)
    for name, file in record.files.items():  # gc may have been about to remove one that lay there unused: see gc.py
        if not store.exists(object_name(file.sha256)):
            put_object(store, file.sha256, out / name)
    return record
