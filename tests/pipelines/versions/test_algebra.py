"""The shard algebra: whatever is done to a list, its rules or its CLIP, the next run does again the shards that this
touches and no others, and ends with the manifests of a run that began with nothing.

The stages, the store and the pictures are real; what should happen is said by a model of a few lines, which knows lists
of rows and neither keys nor digests. `make proof-algebra` tries many more lists than the tests do.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from infra.records.manifest import Action, Manifest, Record
from infra.records.objects import object_name
from infra.store.opening import open_store
from pipelines.embed.stage import Embed
from pipelines.engine.graph import resolve
from pipelines.select.rules import Aspect, BlockedTerms, Caption, ExactDuplicates, Rule, Size
from pipelines.select.stage import FeatureStage, Select
from pipelines.source.columns import LAYOUTS
from pipelines.source.stage import SourceHow
from pipelines.versions.verify import lose, mend, verify
from tests.fixtures.samples import gather_of, picture, source_of, write_folder
from tests.fixtures.stages import make

PER_SHARD = 8
SIDES = {"a.png": 40, "b.png": 40, "c.png": 24, "d.png": 64, "copy-of-a.png": 40, "only.png": 48}
STATES = {"broken.png": "not_an_image", "small.png": "too_small", "nowhere.png": "no_file"}
"""File → the state of its rows, of files that cannot be kept."""
WORDS = ("", "one", "a few words", "forbidden words here")
RULES: dict[str, Rule] = {
    "size": Size(min_side=32),
    "caption": Caption(min_words=3),
    "blocked_terms": BlockedTerms(terms=("forbidden",)),
    "exact_duplicates": ExactDuplicates(),
    "aspect": Aspect(max_ratio=2.0),
}


class Row(NamedTuple):
    """A line of the list."""

    file: str
    caption: str


ONLY = Row("only.png", "a row that every rule lets stay")
"""Of the one row that is never taken away, since a run that keeps nothing is refused."""
rows = st.builds(
    lambda file, words, number: Row(file, f"{words} {number}" if words else ""),
    st.sampled_from([*(name for name in SIDES if name != ONLY.file), *STATES]),
    st.sampled_from([word for word in WORDS for _ in range(3 if word else 1)]),
    st.integers(0, 10**6),
)
Shard = tuple[Row, ...]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What lies under each name that a list may name, nowhere.png apart."""
    seeds = {name: 1 if name == "copy-of-a.png" else number for number, name in enumerate(SIDES, 1)}
    found = {name: picture(seeds[name], side=side) for name, side in SIDES.items()}
    return found | {"broken.png": b"no picture at all", "small.png": picture(99, side=8)}


def content(row: Row) -> Row:
    """The row by what it names: two files of the same bytes are one picture."""
    return Row(row.file.removeprefix("copy-of-"), row.caption)


def state_of(row: Row) -> str:
    """What a row is after its picture was taken."""
    if row.file == "nowhere.png":
        return "no_file"
    return STATES.get(row.file, "kept") if row.caption else "no_caption"


def verdicts(shards: Sequence[Shard], rules: Sequence[str]) -> list[tuple[str | None, ...]]:
    """For each shard, what the rules say of its kept rows, in order; said once more, without a column or a table."""
    seen, out = set[str](), []
    for shard in shards:
        said: list[str | None] = []
        for row in shard:
            if state_of(row) != "kept":
                continue
            bad = {
                "size": SIDES[row.file] < 32,
                "caption": len(row.caption.split()) < 3,
                "blocked_terms": "forbidden" in row.caption,
                "exact_duplicates": content(row).file in seen,
                "aspect": False,
            }
            first = next((name for name in rules if bad[name]), None)
            reached = rules if first is None else rules[: rules.index(first)]
            if "exact_duplicates" in reached:
                seen.add(content(row).file)
            said.append(first)
        out.append(tuple(said))
    return out


class Rebuilding(RuleBasedStateMachine):
    """A list that is changed, and a store in which its data is rebuilt after each change."""

    pictures: dict[str, bytes]
    scratch: Path

    @initialize(listed=st.lists(rows, min_size=12, max_size=60))
    def begin(self, listed: list[Row]) -> None:
        self.home = self.scratch / f"list-{len(list(self.scratch.iterdir()))}"
        self.store = open_store(str(self.home / "store"))
        self.folder, self.moves = write_folder(self.home / "0", self.pictures.items()), 0
        self.list, self.rules, self.clip = [ONLY, *listed], list(RULES)[:3], 0
        self.gathered = set[Shard]()
        self.looked = set[tuple[Shard, tuple[str, ...]]]()
        self.chosen = set[tuple[tuple[Shard, ...], tuple[str, ...]]]()
        self.embedded = dict[tuple[Any, ...], str]()
        self.made: dict[str, Manifest] = {}
        self.rebuild()

    # What a person does to a list.

    @rule(more=st.lists(rows, min_size=1, max_size=20))
    def grow(self, more: list[Row]) -> None:
        self.list += more
        self.rebuild(added=more)

    @rule(at=st.integers(0, 10**6), row=rows)
    def insert(self, at: int, row: Row) -> None:
        self.list.insert(at % (len(self.list) + 1), row)
        self.rebuild(added=[row])

    @precondition(lambda self: set(self.list) != {ONLY})
    @rule(at=st.integers(0, 10**6), row=rows)
    def edit(self, at: int, row: Row) -> None:
        self.list[self.place(at)] = row
        self.rebuild(added=[row])

    @precondition(lambda self: set(self.list) != {ONLY})
    @rule(at=st.integers(0, 10**6), count=st.integers(1, 12))
    def delete(self, at: int, count: int) -> None:
        place = self.place(at)
        while count and place < len(self.list) and self.list[place] != ONLY:
            del self.list[place]
            count -= 1
        self.rebuild()

    @precondition(lambda self: len(self.list) > 12)
    @rule(count=st.integers(1, 10))
    def shrink(self, count: int) -> None:
        tail = [row for row in self.list[-count:] if row == ONLY]
        self.list = self.list[:-count] + tail
        self.rebuild(added=tail)

    @rule(whence=st.integers(0, 10**6), whither=st.integers(0, 10**6))
    def move_a_row(self, whence: int, whither: int) -> None:
        row = self.list.pop(whence % len(self.list))
        self.list.insert(whither % (len(self.list) + 1), row)
        self.rebuild(edits=2, added=[row])

    @rule(whence=st.integers(0, 10**6), whither=st.integers(0, 10**6))
    def say_a_row_again(self, whence: int, whither: int) -> None:
        row = self.list[whence % len(self.list)]
        self.list.insert(whither % (len(self.list) + 1), row)
        self.rebuild(added=[row])

    # What a person does to a recipe.

    @rule(names=st.permutations(list(RULES)), count=st.integers(0, len(RULES)))
    def change_rules(self, names: list[str], count: int) -> None:
        self.rules = names[:count]
        self.rebuild(edits=0)

    @rule()
    def take_another_clip(self) -> None:
        self.clip += 1
        self.rebuild(edits=0)

    # What happens to a store.

    @rule()
    def move_the_list(self) -> None:
        self.moves += 1
        self.folder = self.folder.rename(self.home / str(self.moves))
        self.rebuild(edits=0)

    @rule(which=st.integers(0, 10**6))
    def lose_a_shard(self, which: int) -> None:
        """Its index is gone from the disk, and `verify --mend` has seen it."""
        record = self.made["download"].records[which % len(self.made["download"].records)]
        self.store.delete(object_name(record.sha("index.parquet")))
        mend(self.store, verify(self.store))
        self.gathered.discard(self.shards[which % len(self.shards)])
        self.rebuild(edits=0)

    @rule(stage=st.sampled_from(["source", "download"]), which=st.integers(0, 10**6))
    def make_an_upstream_anew(self, stage: str, which: int) -> None:
        """It gives the same bytes, so that nothing behind it is done again."""
        records = self.made[stage].records
        number = which % len(records)
        record, place = records[number], self.made[stage].action.place
        lose(self.store, f"records/{place}/{record.key}.{record.generation}.json")
        if stage == "download":
            self.gathered.discard(self.shards[number])
        self.rebuild(edits=0)

    # What must be true.

    @invariant()
    def every_row_is_in_one_state(self) -> None:
        if not self.made:
            return
        source, download, chosen = (self.made[name] for name in ("source", "download", "filter"))
        assert sum(source.states.values()) == len(self.list)
        assert source.states["listed"] == sum(map(len, self.shards)) == download.rows
        named = [[content(row) for row in shard] for shard in self.shards]
        assert {row for shard in named for row in shard} == {*map(content, self.list)}
        assert all(len({*shard}) == len(shard) for shard in named)
        assert download.states == Counter(state_of(row) for shard in self.shards for row in shard)
        said = Counter(verdict or "kept" for shard in self.verdicts for verdict in shard)
        assert chosen.states == said
        assert said.total() == download.states["kept"]

    def teardown(self) -> None:
        if not getattr(self, "made", None):
            return
        fresh = open_store(str(self.home / "fresh"))
        made: dict[str, Manifest] = {}
        for stage in self.stages():
            made[stage.name] = make(fresh, stage, *(made[need] for need in stage.needs))
        assert {name: one.version for name, one in made.items()} == {
            name: one.version for name, one in self.made.items()
        }
        assert not verify(self.store).findings

    # How it is rebuilt.

    def place(self, at: int) -> int:
        """A place in the list, of any row but the one that stays."""
        return [place for place, row in enumerate(self.list) if row != ONLY][
            at % (len(self.list) - self.list.count(ONLY))
        ]

    def stages(self) -> list[Any]:
        how = SourceHow(folder=str(self.folder))
        rules = tuple(RULES[name] for name in self.rules)
        lines = (json.dumps({"file_name": row.file, "text": row.caption}) for row in self.list)
        (self.folder / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines))
        source = source_of(how, PER_SHARD, LAYOUTS["imagefolder"])
        return [source, gather_of(how), FeatureStage("filter", rules), Select("filter", rules)]

    def rebuild(self, edits: int = 1, added: Sequence[Row] = ()) -> None:
        """Runs all stages; what each of them does must be what the model says is touched.

        edits: in how many places the list was changed; added: the rows that came there.
        """
        source, gather, look, select = self.stages()
        self.made["source"] = make(self.store, source)
        record = self.made["source"].only
        tables = [pq.read_table(self.store.local(object_name(record.sha(name)))) for name in record.facts["slices"]]
        self.shards = [
            tuple(Row(row["member"]["file"], row["caption"]) for row in table.to_pylist()) for table in tables
        ]
        fresh = [shard for shard in self.shards if shard not in self.gathered]
        beside = [shard for shard in fresh if not set(shard) & set(added)]
        if self.gathered and edits:
            assert len(beside) <= (2 if added else 3) * edits, "more than an edit's shard and its two neighbours"
        inputs = {record.sha(name): shard for name, shard in zip(record.facts["slices"], self.shards, strict=True)}
        assert [inputs[action.inputs[0]] for action in resolve(gather, [self.made["source"]], self.store).todo] == fresh
        self.made["download"] = make(self.store, gather, self.made["source"])
        self.gathered |= {*fresh}

        rules = tuple(self.rules)
        indexed = [one.sha("index.parquet") for one in self.made["download"].records]
        indices = dict(zip(indexed, self.shards, strict=True))
        fresh = [shard for shard in self.shards if (shard, rules) not in self.looked]
        found = resolve(look, [self.made["download"]], self.store).todo
        assert [indices[action.inputs[0]] for action in found] == fresh
        self.made["filter-look"] = make(self.store, look, self.made["download"])
        self.looked |= {(shard, rules) for shard in fresh}

        asked = (tuple(self.shards), rules)
        needs = [self.made["filter-look"], self.made["download"]]
        assert len(resolve(select, needs, self.store).todo) == (asked not in self.chosen)
        self.made["filter"] = make(self.store, select, *needs)
        self.chosen.add(asked)
        self.verdicts = verdicts(self.shards, self.rules)

        # Embeddings are not computed here: what of them would be is in their keys.
        clip = Manifest(Action("clip/1", {}, ()), (Record("", 0, {}, facts={"seed": self.clip}),))
        actions = Embed().actions(self.made["download"], self.made["filter"], clip)
        for shard, said, action in zip(self.shards, self.verdicts, actions, strict=True):
            assert self.embedded.setdefault((shard, said, self.clip), action.key) == action.key
        assert len(set(self.embedded.values())) == len(self.embedded)


EXAMPLES, STEPS = {"proof": (settings().max_examples, 40), "all": (10, 12)}.get(
    str(settings.get_current_profile_name()), (3, 8)
)
"""Histories of a list, and changes in each."""


@pytest.mark.slow
def test_what_is_touched_is_done_again_and_nothing_else(
    pictures: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    class Here(Rebuilding):
        scratch = tmp_path_factory.mktemp("algebra")

    Here.pictures = pictures
    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
