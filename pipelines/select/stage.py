"""Which rows stay: `filter` over what was downloaded, `curate` over what was embedded. Two stages each.

`-look` reads each shard once; `select` goes through all looks in manifest order and writes a selection per shard: uid
and the first rule that rejects, null where the row stays. Rows are marked, never deleted.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import Refused
from infra.records import INDEX, KEPT, SELECTION, Action, Manifest, Record, embedded_schema, object_name
from infra.store import Store
from pipelines.select.rules import MEASURES, Rule, measured
from pipelines.stage import StageBase, plain

FEATURES = "look.parquet"
AnyLook = TypeVar("AnyLook", bound="Features")
Judged = tuple[AnyLook, np.ndarray]
"""A look, and int8 [rows]: the place of the rule that rejects the row, -1 where it stays."""


@dataclass(frozen=True)
class RowSource:
    """What rules are applied to: the stage whose shards they are, the file of rows in each, its columns (to which those
    come that are kept from the list), and the tar of its pictures, of which more can be measured."""

    stage: str
    file: str
    columns: tuple[str, ...]
    pictures: str | None = None


ROW_SOURCES = {
    "filter": RowSource("download", "index.parquet", (*INDEX.names, *MEASURES), "images.tar"),
    "curate": RowSource("embed", "rows.parquet", tuple(embedded_schema(1).names)),
}


@dataclass(frozen=True)
class SelectSpec:
    """Rules, in the order in which they are applied."""

    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class _Selecting(StageBase):
    """What both stages of a selection share."""

    group: str
    """filter or curate."""
    rules: tuple[Rule, ...] = ()
    kept: tuple[str, ...] = ()
    """Columns of the list that the rows of download have too."""
    how = None

    def __post_init__(self) -> None:
        marks = Counter(rule.label for rule in self.rules)
        if twice := [mark for mark, count in marks.items() if count > 1]:
            raise Refused(
                f"{self.group}.rules has {twice[0]!r} twice; give each a `name`, so that a row says which it was"
            )
        for number, rule in enumerate(self.rules):
            if missing := set(rule.columns) - self._columns(self.group):
                there = [
                    f"put it under {name}.rules" for name in ROW_SOURCES if set(rule.columns) <= self._columns(name)
                ]
                advice = (
                    there[0]
                    if there
                    else "name the list's column in source.columns.keep, for a rule under filter.rules"
                )
                raise Refused(
                    f"{self.group}.rules.{number}: {rule.label} reads {', '.join(sorted(missing))}, which the rows "
                    f"of {self.over.stage} do not have; {advice}"
                )

    def _columns(self, group: str) -> set[str]:
        return {*ROW_SOURCES[group].columns, *(self.kept if group == "filter" else ())}

    @property
    def measures(self) -> list[str]:
        """What must be measured of each picture for these rules."""
        return sorted({column for rule in self.rules for column in rule.columns} & MEASURES.keys())

    @property
    def over(self) -> RowSource:
        """What the rules are applied to."""
        return ROW_SOURCES[self.group]

    @property
    def spec(self) -> SelectSpec:
        """All that may change a byte."""
        return SelectSpec(self.rules)


@dataclass(frozen=True)
class FeatureStage(_Selecting):
    """Stage, a map: a shard of rows → what each rule has to know of its kept rows (uid, `<rule>.<column>` …)."""

    kind = "task"

    @property
    def name(self) -> str:
        return f"{self.group}-look"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.over.stage,)

    @property
    def maps(self) -> str:
        return self.over.stage

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        (data,) = inputs
        spec = plain(self.spec)
        files = [self.over.file, *([self.over.pictures] if self.over.pictures and self.measures else [])]
        for record in data.records:
            yield self.action(spec, (record.sha(file) for file in files))

    def run(self, action: Action, store: Store, out: Path) -> Record:
        with pq.ParquetFile(store.local(object_name(action.inputs[0]))) as file:
            asked = {"uid", "state", *(column for rule in self.rules for column in rule.columns)}
            asked |= {"offset", "length"} if self.measures else set()
            rows = file.read([name for name in file.schema_arrow.names if name in asked])
        if "state" in rows.column_names:
            rows = rows.filter(pc.equal(rows["state"], KEPT))
        if self.measures:
            with open(store.local(object_name(action.inputs[1])), "rb") as pictures:
                rows = measured(rows, pictures, self.measures)
        columns: dict[str, Any] = {"uid": rows["uid"]}
        for rule in self.rules:
            look = rule.features(rows)
            columns |= {f"{rule.label}.{name}": look[name] for name in look.column_names}
        pq.write_table(pa.table(columns), out / FEATURES, compression="zstd")
        return Record.of(action, out, states={"looked": rows.num_rows})


@dataclass(frozen=True)
class Select(_Selecting):
    """Stage, a reduce: all looks → one selection per shard, `<SHA-256 of the shard's rows>.parquet`."""

    role = "selection"

    @property
    def step(self) -> str:
        return f"kept by {self.group}"

    @property
    def name(self) -> str:
        return self.group

    @property
    def needs(self) -> tuple[str, ...]:
        return (f"{self.group}-look", self.over.stage)

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        looks, data = inputs
        pairs = zip(looks.records, data.records, strict=True)
        shas = [sha for look, rows in pairs for sha in (look.sha(FEATURES), rows.sha(self.over.file))]
        yield self.action(plain(self.spec), shas)

    def run(self, action: Action, store: Store, out: Path) -> Record:
        looks, shards = action.inputs[0::2], action.inputs[1::2]
        names = pa.array([rule.label for rule in self.rules], pa.string())
        counts = np.zeros(1 + len(names), np.int64)
        for shard, (look, marks) in zip(
            shards, decide(self.rules, (StoredFeatures(store, sha) for sha in looks)), strict=True
        ):
            rules = pa.DictionaryArray.from_arrays(pa.array(marks, mask=marks < 0), names).cast(pa.string())
            selection = pa.table([look.uids, rules], schema=SELECTION)
            pq.write_table(selection, out / f"{shard}.parquet", compression="zstd")
            counts += np.bincount(marks + 1, minlength=len(counts))
        found = zip([KEPT, *names.to_pylist()], counts.tolist(), strict=True)
        states = Counter({state: count for state, count in found if count})
        if not states[KEPT]:
            raise Refused(self._nothing(states, [store.local(object_name(shard)) for shard in shards]), code=5)
        return Record.of(action, out, states=dict(states))

    def _nothing(self, states: Counter[str], shards: Sequence[Path]) -> str:
        """Why no row is left: what the rules rejected, or what became of the rows before they came here."""
        if states.total():
            counted = ", ".join(f"{rule} {count}" for rule, count in sorted(states.items()) if count)
            return (
                f"{self.group}: of the {states.total()} rows of {self.over.stage} none stays ({counted}). "
                f"Loosen {self.group}.rules."
            )
        before: Counter[str] = Counter()
        for shard in shards:
            with pq.ParquetFile(shard) as file:
                if "state" in file.schema_arrow.names:
                    before.update(file.read(["state"])["state"].to_pylist())
        counted = ", ".join(f"{state} {count}" for state, count in before.most_common()) or "it was given none"
        return (
            f"{self.group}: {self.over.stage} kept no row ({counted}). Look at the list, and at the settings of "
            f"{self.over.stage} in the recipe."
        )


class Features(Protocol):
    """What `-look` has put down about the kept rows of one shard."""

    @property
    def rows(self) -> int:
        """How many rows that are."""
        ...

    def part(self, rule: str) -> pa.Table:
        """The columns that the rule of that name made, without its name."""
        ...


@dataclass(frozen=True)
class StoredFeatures:
    """A look as it lies in the store. Each rule reads its own columns when its turn comes, so that no look waits in
    memory for a rule that has to see all of them before it decides."""

    store: Store
    sha256: str

    @property
    def rows(self) -> int:
        return pq.read_metadata(self._path).num_rows

    @property
    def uids(self) -> pa.ChunkedArray:
        """uid of each row."""
        return pq.read_table(self._path, columns=["uid"], use_threads=False)["uid"]

    def part(self, rule: str) -> pa.Table:
        prefix = f"{rule}."
        with pq.ParquetFile(self._path) as file:
            names = [name for name in file.schema_arrow.names if name.startswith(prefix)]
            table = file.read(names, use_threads=False)
        return table.rename_columns([name.removeprefix(prefix) for name in names])

    @property
    def _path(self) -> Path:
        return self.store.local(object_name(self.sha256))


def decide(rules: Sequence[Rule], looks: Iterable[AnyLook]) -> Iterator[Judged[AnyLook]]:
    """Applies rules in order to looks in manifest order. One byte a row waits for a rule that decides over all; what
    else such a rule holds is its own matter."""
    stream: Iterator[Judged[AnyLook]] = ((look, np.full(look.rows, -1, np.int8)) for look in looks)
    for place, rule in enumerate(rules):
        stream = _apply(place, rule, stream)
    return stream


def _apply(place: int, rule: Rule, stream: Iterator[Judged[AnyLook]]) -> Iterator[Judged[AnyLook]]:
    pending: deque[Judged[AnyLook]] = deque()

    def survivors() -> Iterator[pa.Table]:
        for look, marks in stream:
            pending.append((look, marks))
            yield look.part(rule.label).filter(pa.array(marks < 0))

    for rejected in rule.reject(survivors()):
        look, marks = pending.popleft()
        marks[np.flatnonzero(marks < 0)[rejected]] = place
        yield look, marks


def read_selection(store: Store, sha: str) -> pa.Array:
    """uids, in order, that the selection object of that SHA-256 lets stay."""
    table = pq.read_table(store.local(object_name(sha)))
    return table["uid"].combine_chunks().filter(pc.is_null(table["rule"].combine_chunks()))
