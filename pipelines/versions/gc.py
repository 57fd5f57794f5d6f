"""Removes what nothing refers to any more. It only says what it would remove, unless told to.

**What stays.** Everything that a kept version of the data lists; a version is kept with all versions that it was made
from. Which ones are kept:
- always: what any entry of any ledger released, however long ago it was rolled back, with its evaluation; what was made
  or used by a run within `older_s` (a day), or since a day before a fit that is still going on began;
- Keep.ALL: every version that a manifest lists. Then what goes is what killed runs left, and superseded generations;
- Keep.NEWEST: the newest version of each stage and settings, that is of each recipe that was run here. Two lists that
  went through the same settings count as one: pictures of the other are gone from the store, and must be fetched again.
Records of a stage that was not finished stay, so that it can be, and checkpoints of models that are not; `abandoned`
gives both up. Ledgers, mirrors and the list of forgotten samples are never touched.

**Beside runs.** A run may be about to refer to an old object that nothing refers to now. `put_new` dates anew what lies
there already, and so does a stage that finds its manifest: hence a thing in use is young, and is spared. gc looks at a
name's date right before it removes it; and `commit` looks after its files once more when the record is there, and puts
back what went in between. (git's gc works by the same rule.) Shards that a run found done, and means to list hours from
now, are not dated anew; manifests list them, so Keep.ALL leaves them alone, and Keep.NEWEST removes nothing while a run
goes on, nor does a run begin meanwhile: both announce themselves by a lease, and look for the other's then.

**Killed anywhere**, it leaves nothing that refers to what is gone: first go records, then manifests, then objects.
"""

from __future__ import annotations

import contextlib
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from infra.concurrent import map_unordered
from infra.errors import Refused
from infra.lease import Lease, alive, clock, is_held
from infra.ledger import Ledger
from infra.records import Manifest, document, explain_damage, newest_generations, object_name, split_name
from infra.store import Entry, Store

DAY_S = 86_400
LEASE, STRICT, RUN = "gc", "gc-strict", "run-"
"""Keys of leases: of any gc that removes, of one that no run may go on beside, and (its beginning) of a run."""
THREADS = 8

Told = Callable[[str, int, int], None]
"""Hears what is being done, how much of it is done, and how much there is (0: not known)."""


class Keep(StrEnum):
    """Which versions stay beside those of releases."""

    ALL = "all"
    NEWEST = "newest"


@dataclass(frozen=True)
class Head:
    """A manifest's head without its list of records."""

    name: str
    stage: str
    version: str
    inputs: tuple[str, ...]
    rows: int
    used: datetime
    """When a run last made or found it (UTC)."""

    @property
    def place(self) -> str:
        """Stage and settings."""
        return self.name.rpartition("/")[0]


@dataclass
class Garbage:
    """What was removed, or would be."""

    versions: list[Head] = field(default_factory=list)
    count: Counter[str] = field(default_factory=Counter)
    """Kind of name (objects, records, …) → how many."""
    bytes: Counter[str] = field(default_factory=Counter)
    """Kind of name → bytes."""
    young: int = 0
    """Names that nothing refers to and that are too young to go."""


@dataclass
class _Marked:
    """What stays."""

    objects: set[bytes] = field(default_factory=set)
    """SHA-256s."""
    keys: set[str] = field(default_factory=set)
    """Keys of the records of kept versions."""
    listed: dict[str, int] = field(default_factory=dict)
    """Key → the newest generation of it that any manifest lists, kept or not."""
    dropped: list[Head] = field(default_factory=list)


def collect(
    store: Store,
    keep: Keep = Keep.ALL,
    *,
    older_s: float = DAY_S,
    abandoned: bool = False,
    delete: bool = False,
    told: Told = lambda *_: None,
) -> Garbage:
    """Finds what nothing refers to, removes it if told to, and says what it was. Refused while another gc removes.

    older_s: what was put or used within so many seconds stays. abandoned: unfinished stages and fits go as well.
    """
    if not delete:
        return _collect(store, keep, datetime.now(UTC), older_s, abandoned, False, told)
    lease = Lease.acquire(store, LEASE)
    if lease is None:
        raise Refused(f"another gc is removing things from {store.uri}; wait until it has ended", code=4)
    with lease.kept(), contextlib.ExitStack() as stack:
        if keep is Keep.NEWEST or abandoned:
            if (strict := Lease.acquire(store, STRICT)) is not None:
                stack.enter_context(strict.kept())
            live = alive(store, datetime.now(UTC) - timedelta(days=1))
            if any(key.startswith(RUN) and is_held(store, key) for key in live):
                raise Refused(
                    f"a run on {store.uri} is going on, and may need what this would remove. Wait until it has ended; "
                    "without --keep newest and --abandoned, gc goes beside runs.",
                    code=4,
                )
        return _collect(store, keep, clock(store, LEASE), older_s, abandoned, True, told)


@contextlib.contextmanager
def run_lease(store: Store) -> Iterator[None]:
    """A run says that it is there, for as long as the context lasts; Refused while old versions are being removed."""
    lease = Lease.acquire(store, f"{RUN}{uuid.uuid4().hex[:16]}")
    assert lease is not None
    with lease.kept():
        if is_held(store, STRICT):
            raise Refused(f"old versions are being removed from {store.uri} (unclip data gc). Run again soon.", code=4)
        yield


def _collect(
    store: Store, keep: Keep, now: datetime, older_s: float, abandoned: bool, delete: bool, told: Told
) -> Garbage:
    live = alive(store, now - timedelta(days=1))
    fits = [taken for key, taken in live.items() if key not in (LEASE, STRICT)]
    since = min([now, *fits]) - timedelta(seconds=older_s)
    marked = _mark(store, keep, since, told)
    names = [entry.name for entry in store.list("records/")]
    standing = newest_generations(names)
    for key, (generation, name) in standing.items():
        unfinished = key not in marked.listed and not abandoned
        # What was forgotten, asked again or mended since: the next run lists it in the place of what it supersedes.
        superseding = key in marked.keys and generation > marked.listed.get(key, generation)
        if unfinished or superseding:
            _mark_record(store, name, marked)
    garbage = Garbage(marked.dropped)
    for kind, candidates in _candidates(store, marked, standing, live, abandoned):
        _sweep(store, kind, candidates, since, delete, garbage, told)
    return garbage


def _mark(store: Store, keep: Keep, since: datetime, told: Told) -> _Marked:
    """Follows what is kept through the manifests to objects and records."""
    heads = list(_heads(store, told))
    by_version: dict[str, list[Head]] = {}
    latest: dict[str, Head] = {}
    for head in heads:
        by_version.setdefault(head.version, []).append(head)
        if head.place not in latest or latest[head.place].used <= head.used:
            latest[head.place] = head
    marked = _Marked()
    queue = [version for version, _ in _released(store, marked)]
    queue += [head.version for head in heads if keep is Keep.ALL or head.used > since or latest[head.place] is head]
    versions = set[str]()
    while queue:
        version = queue.pop()
        if version not in versions:
            versions.add(version)
            queue += [one for head in by_version.get(version, ()) for one in head.inputs]
    for done, head in enumerate(heads, 1):
        told("manifests", done, len(heads))
        with explain_damage(head.name):
            pairs = document(store, head.name)["records"]
        for key, generation in pairs:
            marked.listed[key] = max(generation, marked.listed.get(key, 0))
        if head.version in versions:
            marked.keys |= {key for key, _ in pairs}
        else:
            marked.dropped.append(head)
    for done, version in enumerate(versions, 1):
        told("versions", done, len(versions))
        marked.objects.add(bytes.fromhex(version))
        # An input need not be a version: a list's digest names no object.
        if version in by_version or store.exists(object_name(version)):
            _mark_files(store, version, marked)
    return marked


def _heads(store: Store, told: Told) -> Iterator[Head]:
    listed = list(store.list("manifests/"))

    def read(entry: Entry) -> Head:
        with explain_damage(entry.name):
            said = document(store, entry.name)
            action = said["action"]
            return Head(
                entry.name, action["stage"], said["version"], tuple(action["inputs"]), said["rows"], entry.modified
            )

    for done, (_, head) in enumerate(map_unordered(read, listed, THREADS), 1):
        told("manifests", done, len(listed))
        yield head


def _released(store: Store, marked: _Marked) -> Iterator[tuple[str, str]]:
    """Versions that ledgers name, with the line; notes the gates' records."""
    for line in Ledger.names(store):
        for entry in Ledger(store, line).entries():
            if entry.gate:
                marked.keys.add(entry.gate)
            against = entry.facts.get("against") or {}
            for version in (entry.release, entry.facts.get("evaluate"), *against.values()):
                if version:
                    yield version, line


def _mark_files(store: Store, version: str, marked: _Marked) -> None:
    """A version's files. A body that is damaged stops gc, which cannot know then what stays."""
    try:
        records = Manifest.load(store, version).records
    except Refused as error:
        raise Refused(f"{error} gc removes nothing before that: `unclip data verify --mend`.", code=5) from error
    for record in records:
        marked.objects |= {bytes.fromhex(file.sha256) for file in record.files.values()}


def _mark_record(store: Store, name: str, marked: _Marked) -> None:
    with explain_damage(name):
        said = document(store, name)
        marked.keys.add(said["key"])
        marked.objects |= {bytes.fromhex(file["sha256"]) for file in said["files"].values()}
        marked.objects |= {bytes.fromhex(sha256) for sha256 in said["action"]["inputs"]}


def _candidates(
    store: Store, marked: _Marked, standing: dict[str, Any], live: dict[str, datetime], abandoned: bool
) -> Iterator[tuple[str, Iterable[Entry]]]:
    """Kind → names that nothing refers to, in the order in which they go."""
    # All generations of a key or none: else a lost one's number could be given again.
    yield "records", (one for one in store.list("records/") if split_name(one.name)[0] not in marked.keys)
    dropped = {head.name for head in marked.dropped}
    yield "manifests", (one for one in store.list("manifests/") if one.name in dropped)

    def over(name: str) -> bool:
        """Whether the fit that it belongs to is done, or given up."""
        key = name.split("/")[1]
        return key not in live and (key in standing or key.startswith(RUN) or abandoned)

    yield "checkpoints", (one for one in store.list("checkpoints/") if over(one.name))
    kept = (LEASE, STRICT)  # their numbers count on
    yield "leases", (one for one in store.list("leases/") if over(one.name) and one.name.split("/")[1] not in kept)
    yield "objects", (one for one in store.list("objects/") if not _is_marked(one.name, marked))


def _is_marked(name: str, marked: _Marked) -> bool:
    last = name.rpartition("/")[2]
    try:
        return bytes.fromhex(last) in marked.objects
    except ValueError:  # no object of ours: whose it is we do not know
        return True


def _sweep(
    store: Store,
    kind: str,
    candidates: Iterable[Entry],
    since: datetime,
    delete: bool,
    garbage: Garbage,
    told: Told,
) -> None:
    """Removes those that are old enough, some at a time; the listing goes on meanwhile."""

    def remove(entry: Entry) -> tuple[Entry, bool]:
        now = next((one for one in store.list(entry.name) if one.name == entry.name), None) if delete else entry
        old = now is not None and now.modified <= since
        if old and delete:
            store.delete(entry.name)
        return entry, old

    for done, (_, (entry, gone)) in enumerate(map_unordered(remove, candidates, THREADS), 1):
        told(kind, done, 0)
        if gone:
            garbage.count[kind] += 1
            garbage.bytes[kind] += entry.bytes
        else:
            garbage.young += 1
