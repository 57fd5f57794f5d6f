"""What changed between two versions of the data: settings, shards, and rows, by uid and by the state they end in.

Files that both versions have are not read. The rows of the others are dealt by uid into parts on disk, and compared a
part at a time: memory is bounded by `PART_ROWS`, whatever the size of the data. Versions are multisets of rows (uid,
state), since a list may name a pair twice in shards of its own; what is left on both sides of a uid is `changed`, pair
by pair, the rest `added` or `removed`. So diff(B, A) is diff(A, B) with its sides exchanged, and rows of A, less what
was removed, with what was changed and added, are those of B.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from infra.documents import canonical, digest
from infra.errors import Refused
from infra.records import KEPT, UID, Manifest, Record, document, explain_damage, object_name, removed_objects
from infra.store import Store
from pipelines.engine import differences, find_version

PART_ROWS = 100_000
"""Rows of a part, of both versions together, on average."""
ROWS = pa.schema([("uid", UID), ("before", pa.string()), ("after", pa.string())])
"""What `rows` writes: a row that was added has no `before`, one that was removed no `after`."""
_STATES = ("state", "rule")


@dataclass(frozen=True)
class Difference:
    """What it takes to come from version A to version B."""

    stage: str
    a: str
    b: str
    settings: list[str] = field(default_factory=list)
    """What differs in spec and stage version, as "dotted.path old → new"."""
    rows: tuple[int, int] = (0, 0)
    """Rows of A, and of B."""
    shards: Counter[str] = field(default_factory=Counter)
    """shared, removed, new: shards with the same contents in both, or in one alone."""
    added: Counter[str] = field(default_factory=Counter)
    """State → rows that B alone has."""
    removed: Counter[str] = field(default_factory=Counter)
    """State → rows that A alone has."""
    changed: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(State in A, state in B) → rows that both have, in another state."""

    forgotten: tuple[int, int] = (0, 0)
    """Tables of A, and of B, that are gone since they held forgotten samples: nobody can say any more what else was in
    them, so their rows are in no count, and those of their successors count as if they were new."""

    @property
    def empty(self) -> bool:
        """Whether both are the same data."""
        return self.a == self.b


def diff(store: Store, a: str, b: str, rows: Path | None = None) -> list[Difference]:
    """Compares two versions of one stage, named by their first digits; of two releases, each version they come from.

    rows: a Parquet file (ROWS) to write every row to that differs, for two versions of one stage. Refused for versions
    of different stages, and where there is none.
    """
    one, other = find_version(store, a), find_version(store, b)
    name = one.stage.partition("/")[0]
    if name != other.stage.partition("/")[0]:
        raise Refused(f"{a} is a version of {one.stage} and {b} one of {other.stage}; compare two of the same stage")
    if name != "bundle":
        return [_compare(store, name, one.version, other.version, rows)]
    if rows is not None:
        raise Refused("--rows compares two versions of one stage; a release comes from several")
    mine, theirs = (_sources(store, version.version) for version in (one, other))
    return [_compare(store, stage, mine[stage], theirs[stage], None) for stage in mine if stage in theirs]


def _sources(store: Store, bundle: str) -> dict[str, str]:
    """Stage → version of what a release was made from, in the release's order."""
    with explain_damage(object_name(bundle)):
        record = Manifest.load(store, bundle).only
        return dict(json.loads(store.get(object_name(record.sha("release.json"))))["data"])


def _compare(store: Store, stage: str, a: str, b: str, rows: Path | None) -> Difference:
    before, after = Manifest.load(store, a, stage), Manifest.load(store, b, stage)
    heads = [find_version(store, version).head for version in (a, b)]
    actions = [document(store, head)["action"] for head in heads]
    said = [{"version": action["stage"].partition("/")[2], **(action["spec"] or {})} for action in actions]
    out = Difference(
        stage, a, b, differences(said[0], said[1]) if heads[0] != heads[1] else [], (before.rows, after.rows)
    )
    gone = removed_objects(store)
    tables = _shards(before, after, out)
    left = [[sha for sha in side if sha not in gone or store.exists(object_name(sha))] for side in tables]
    out = replace(out, forgotten=(len(tables[0]) - len(left[0]), len(tables[1]) - len(left[1])))
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(pq.ParquetWriter(rows, ROWS, compression="zstd")) if rows else None
        for table in changes(store, *left):
            for was, now, count in _counts(table):
                if was and now:
                    out.changed[was, now] += count
                elif now:
                    out.added[now] += count
                elif was:
                    out.removed[was] += count
            if writer:
                writer.write_table(table)
    return out


def _shards(before: Manifest, after: Manifest, out: Difference) -> tuple[list[str], list[str]]:
    """Counts shards, and returns the SHA-256s of the tables of rows that A, and that B alone has."""
    mine, theirs = (Counter(digest(canonical(one.content)) for one in manifest.records) for manifest in (before, after))
    shared = mine & theirs
    out.shards.update(shared=shared.total(), removed=(mine - shared).total(), new=(theirs - shared).total())
    tables = [Counter(sha for record in manifest.records for sha in _tables(record)) for manifest in (before, after)]
    return list((tables[0] - tables[1]).elements()), list((tables[1] - tables[0]).elements())


def _tables(record: Record) -> Iterator[str]:
    return (file.sha256 for name, file in record.files.items() if name.endswith(".parquet"))


def changes(store: Store, before: list[str], after: list[str]) -> Iterator[pa.Table]:
    """Rows (ROWS) in which two lists of tables differ, part by part; tables without uids have no rows here."""
    sizes = [pq.read_metadata(store.local(object_name(sha))).num_rows for sha in (*before, *after)]
    parts = min(256, -(-sum(sizes) // PART_ROWS)) or 1
    with tempfile.TemporaryDirectory(prefix="unclip-diff-") as folder:  # the store is only read
        for side, tables in (("before", before), ("after", after)):
            _deal(store, tables, Path(folder), side, parts)
        for part in range(parts):
            table = _joined(*(_part(Path(folder) / f"{side}-{part}") for side in ("before", "after")))
            if table.num_rows:
                yield table


def _deal(store: Store, tables: list[str], folder: Path, side: str, parts: int) -> None:
    """Writes (uid, state) of these tables to a file a part, a row group at a time."""
    schema = pa.schema([("uid", UID), ("state", pa.string())])
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(ipc.new_stream(folder / f"{side}-{part}", schema)) for part in range(parts)]
        for sha in tables:
            for batch in _states(store, sha):
                first = pc.binary_slice(batch["uid"].cast(pa.binary()), 0, 1) if parts > 1 else None
                for part, file in enumerate(files):
                    # uids are digests: their first byte deals them evenly.
                    mine = [bytes([byte]) for byte in range(part, 256, parts)]
                    here = batch if first is None else batch.filter(pc.is_in(first, value_set=pa.array(mine)))
                    file.write_table(here)


def _states(store: Store, sha: str) -> Iterator[pa.Table]:
    """(uid, state) of a table of rows: a state, or the rule that rejected; what has neither is kept."""
    name = object_name(sha)
    with explain_damage(name), pq.ParquetFile(store.local(name)) as file:
        if "uid" not in file.schema_arrow.names:
            return
        state = next((column for column in _STATES if column in file.schema_arrow.names), None)
        for batch in file.iter_batches(65_536, columns=["uid", *([state] if state else [])]):
            states = batch[state] if state else pa.nulls(batch.num_rows, pa.string())
            yield pa.table({"uid": batch["uid"], "state": pc.fill_null(states, KEPT)})


def _part(path: Path) -> pa.Table:
    """A part with its rows counted: uid, state, count."""
    with ipc.open_stream(path) as stream:
        table = stream.read_all()
    path.unlink()
    return table.group_by(["uid", "state"]).aggregate([([], "count_all")])


def _joined(before: pa.Table, after: pa.Table) -> pa.Table:
    """The rows in which two parts differ, as ROWS, ordered by uid."""
    both = before.join(after, ["uid", "state"], join_type="full outer", left_suffix="_a", right_suffix="_b")
    was, now = (pc.fill_null(both[f"count_all_{side}"], 0) for side in "ab")
    both = both.set_column(2, "more", pc.subtract(now, was)).filter(pc.not_equal(was, now)).sort_by("uid")
    lines: list[tuple[bytes, str | None, str | None]] = []
    gone: dict[bytes, list[str]] = {}
    come: dict[bytes, list[str]] = {}
    for uid, state, more in zip(*(both[name].to_pylist() for name in ("uid", "state", "more")), strict=True):
        (come if more > 0 else gone).setdefault(uid, []).extend([state] * abs(more))
    for uid in dict.fromkeys([*both["uid"].to_pylist()]):
        olds, news = sorted(gone.get(uid, [])), sorted(come.get(uid, []))
        pairs = min(len(olds), len(news))
        lines += [(uid, old, new) for old, new in zip(olds[:pairs], news[:pairs], strict=True)]
        lines += [(uid, old, None) for old in olds[pairs:]] + [(uid, None, new) for new in news[pairs:]]
    columns: list[Any] = [list(column) for column in zip(*lines, strict=True)] or [[], [], []]
    return pa.table(columns, schema=ROWS)


def _counts(table: pa.Table) -> Iterator[tuple[str | None, str | None, int]]:
    counted = table.group_by(["before", "after"]).aggregate([([], "count_all")])
    yield from zip(*(counted[name].to_pylist() for name in ("before", "after", "count_all")), strict=True)


def as_text(found: Difference) -> str:
    """For a person."""
    lines = [f"{found.stage} {found.a[:12]} → {found.b[:12]}"]
    if found.empty:
        return f"{lines[0]}: the same"
    lines += [f"  settings  {line}" for line in found.settings]
    shards = ", ".join(f"{count} {kind}" for kind, count in found.shards.items())
    lines += [f"  rows      {found.rows[0]} → {found.rows[1]}", f"  shards    {shards}"]
    if any(found.forgotten):
        gone = f"{found.forgotten[0]} of the first, {found.forgotten[1]} of the second"
        lines.append(f"  not read  tables that held forgotten samples ({gone}); rows that replace theirs seem new")
    for sign, counter in (("+", found.added), ("-", found.removed)):
        lines += [f"  {sign}         {state} {count}" for state, count in sorted(counter.items())]
    lines += [f"  ~         {was} → {now} {count}" for (was, now), count in sorted(found.changed.items())]
    return "\n".join(lines)


def as_json(found: Difference) -> dict[str, Any]:
    """For a program."""
    changed = [{"before": was, "after": now, "rows": count} for (was, now), count in sorted(found.changed.items())]
    return {**vars(found), "changed": changed}
