"""The ledger of a model line: which release was champion when, judged by which gate, and why.

One object an entry, `ledgers/<name>/<number>.json`; each carries the SHA-256 of the one before, so the last digest
vouches for all. Entries are only ever appended, and a promotion names the head that it was judged against.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from infra.documents import SCHEMA_VERSION, canonical, check_schema, digest
from infra.errors import Refused
from infra.records import explain_damage
from infra.store import Store

KINDS = ("promote", "rollback")


@dataclass(frozen=True)
class Entry:
    """One line of the ledger. What `append` fills in is empty until then."""

    kind: str
    """"promote" or "rollback"."""
    release: str
    """Version of the bundle that is champion from here on."""
    gate: str | None = None
    """Key of the gate's record; None where a person decided alone."""
    reason: str = ""
    """For the reader: why."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Plain JSON: what else was known, such as scores."""
    number: int = 0
    """1 for the first."""
    previous: str = ""
    """Digest of the entry before; empty for the first."""
    nonce: str = ""
    """Random, so that no two entries have equal bytes."""
    time: str = ""
    """ISO 8601, UTC, by the writer's clock."""
    digest: str = ""
    """SHA-256 of the entry's bytes."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise Refused(f"a ledger entry is one of {', '.join(KINDS)}, not {self.kind!r}")

    def to_json(self) -> bytes:
        """The bytes that are stored, and that `digest` is of."""
        fields = asdict(self)
        del fields["digest"]
        return canonical({"schema_version": SCHEMA_VERSION, **fields})

    @classmethod
    def from_json(cls, data: bytes, where: str = "ledger entry") -> Entry:
        """Reads `to_json`'s bytes; Refused for an unknown schema version, and where they are damaged."""
        with explain_damage(where):
            fields = check_schema(json.loads(data), where)
            known = {name: value for name, value in fields.items() if name != "schema_version"}
            return cls(**known, digest=digest(data))


@dataclass(frozen=True)
class Ledger:
    """The ledger `name` of a store."""

    store: Store
    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise Refused(f"release.name {self.name!r}: use up to 100 letters, digits, dots, hyphens and underscores")

    @staticmethod
    def names(store: Store) -> list[str]:
        """The ledgers that a store has."""
        return sorted({entry.name.split("/")[1] for entry in store.list("ledgers/")})

    def entries(self) -> Iterator[Entry]:
        """All entries, the first first."""
        for number in self._numbers():
            yield self._read(number)

    def head(self) -> Entry | None:
        """The last entry, or None."""
        numbers = self._numbers()
        return self._read(numbers[-1]) if numbers else None

    def append(self, entry: Entry, after: Entry | None) -> Entry:
        """Appends an entry behind `after` (None: as the first), and returns it completed.

        Refused (code 4) if the head is another than `after`: what was judged against it must be judged anew.
        """
        head = self.head()
        if (head.digest if head else "") != (after.digest if after else ""):
            raise self._moved(head)
        entry = replace(
            entry,
            number=(after.number if after else 0) + 1,
            previous=after.digest if after else "",
            nonce=uuid.uuid4().hex,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        data = entry.to_json()
        if not self.store.put_new(self._object(entry.number), data):
            raise self._moved(self.head())
        return replace(entry, digest=digest(data))

    def verify(self, anchor: str = "") -> int:
        """Walks the chain and returns its length; Refused (code 5) names the first entry that does not fit.

        anchor: a head's digest that was kept outside of the store; Refused if no entry has it, as when the chain was
        cut off or written anew.
        """
        previous, found = "", not anchor
        for expected, number in enumerate(self._numbers(), 1):
            where = f"ledger {self.name}: entry {number}"
            if number != expected:
                raise Refused(f"ledger {self.name}: entry {expected} is missing, {number} is there", code=5)
            data = self.store.get(self._object(number))
            try:
                entry = Entry.from_json(data, where)
            except (ValueError, TypeError) as error:
                raise Refused(f"{where} cannot be read ({error})", code=5) from error
            if entry.number != number or entry.to_json() != data:
                raise Refused(f"{where} is not what was written there", code=5)
            if entry.previous != previous:
                raise Refused(
                    f"{where} follows an entry of digest {entry.previous[:12] or '(none)'}, but entry {number - 1} has "
                    f"{previous[:12] or '(none)'}: one of the two was changed",
                    code=5,
                )
            previous = entry.digest
            found = found or entry.digest == anchor
        if not found:
            raise Refused(
                f"ledger {self.name}: no entry has the digest {anchor[:12]} that was recorded outside of the store: "
                "its end was cut off, or it was written anew",
                code=5,
            )
        return len(self._numbers())

    def _numbers(self) -> list[int]:
        names = (entry.name.rpartition("/")[2] for entry in self.store.list(f"ledgers/{self.name}/"))
        return [int(name.removesuffix(".json")) for name in names if re.fullmatch(r"\d{8}\.json", name)]

    def _object(self, number: int) -> str:
        return f"ledgers/{self.name}/{number:08d}.json"

    def _read(self, number: int) -> Entry:
        return Entry.from_json(self.store.get(self._object(number)), self._object(number))

    def _moved(self, head: Entry | None) -> Refused:
        now = f"is now at entry {head.number} ({head.kind} of {head.release[:12]}, {head.time})" if head else "is empty"
        return Refused(f"ledger {self.name} has moved on and {now}. Run again, to be judged against that.", code=4)
