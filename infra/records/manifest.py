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

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.documents import SCHEMA_VERSION, canonical, check_schema, digest, digest_file
from infra.errors import NotFound, Refused
from infra.records.damage import damaged, explain_damage
from infra.records.objects import object_name, put_object

if TYPE_CHECKING:
    from infra.store import Store


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
        with explain_damage(where):
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
        with explain_damage(name):
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
