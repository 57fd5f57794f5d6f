"""What is to do, and why: resolved from records alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.cluster import ClusterInfo, Node
from infra.errors import Refused
from infra.records.commits import commit
from infra.records.manifest import Action, Manifest, Record
from infra.store.base import Store
from infra.store.opening import open_store
from pipelines.engine.admission import check_room, most_actors
from pipelines.engine.console import Console
from pipelines.engine.execute import Execution
from pipelines.engine.graph import chosen, differences, order, resolve, why
from pipelines.engine.plan import plan
from pipelines.stage import plain


@dataclass(frozen=True)
class Numbers:
    """Writes one file a number: the smallest source of shards."""

    spec: dict[str, Any]
    name: str = "numbers"
    group: str = "numbers"
    needs: tuple[str, ...] = ()
    version: int = 1
    kind: str = "driver"
    how: Any = None

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        for number in self.spec["numbers"]:
            yield Action("numbers/1", {"number": number}, ())

    def setup(self) -> None: ...

    def run(self, action: Action, store: Store, out: Path) -> Record:
        (out / "n.json").write_text(json.dumps(action.spec["number"]))
        return Record.of(action, out, states={"kept": 1})


@dataclass(frozen=True)
class Double:
    """Doubles each number (a map); `constant` makes its output not depend on its spec."""

    spec: dict[str, Any]
    name: str = "double"
    group: str = "double"
    needs: tuple[str, ...] = ("numbers",)
    version: int = 1
    kind: str = "driver"
    how: Any = None

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        for record in inputs[0].records:
            yield Action(f"double/{self.version}", plain(self.spec), (record.sha("n.json"),))

    def setup(self) -> None: ...

    def run(self, action: Action, store: Store, out: Path) -> Record:
        from infra.records.objects import object_name

        number = json.loads(store.get(object_name(action.inputs[0])))
        if number == 13:
            raise Refused("13 is not doubled")
        (out / "n.json").write_text(json.dumps(2 * number))
        return Record.of(action, out, states={"kept": 1})


@dataclass(frozen=True)
class Sum:
    """Adds them up (a reduce)."""

    name: str = "sum"
    group: str = "total"
    needs: tuple[str, ...] = ("double",)
    version: int = 1
    kind: str = "driver"
    spec: Any = None
    how: Any = None

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        yield Action("sum/1", {}, tuple(manifest.version for manifest in inputs))

    def setup(self) -> None: ...

    def run(self, action: Action, store: Store, out: Path) -> Record:
        from infra.records.objects import object_name

        records = Manifest.load(store, action.inputs[0]).records
        total = sum(json.loads(store.get(object_name(record.sha("n.json")))) for record in records)
        (out / "sum.json").write_text(json.dumps(total))
        return Record.of(action, out, facts={"sum": total})


def workflow(numbers: list[int], factor: str = "two") -> list[Any]:
    return [Numbers({"numbers": numbers}), Double({"factor": factor}), Sum()]


def execute(store: Store, stages: list[Any], names: set[str] | None = None) -> dict[str, Manifest]:
    def no_ray() -> tuple[Any, Any]:
        raise AssertionError("Ray was started though nothing needs it")

    execution = Execution(store, stages, no_ray, Console([]))
    return execution.run(names or {stage.name for stage in stages})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def todo(store: Store, stages: list[Any]) -> dict[str, tuple[int, bool]]:
    return {line.stage: (line.todo, line.at_most) for line in plan(stages, store)}


def test_a_run_makes_everything_once_and_the_next_one_nothing(store: Store) -> None:
    assert execute(store, workflow([1, 2, 3]))["sum"].only.facts == {"sum": 12}
    before = sorted(entry.name for entry in store.list(""))
    assert todo(store, workflow([1, 2, 3])) == {"numbers": (0, False), "double": (0, False), "sum": (0, False)}
    execute(store, workflow([1, 2, 3]))
    assert sorted(entry.name for entry in store.list("")) == before


def test_a_plan_of_nothing_counts_shards_and_says_at_most_behind_work(store: Store) -> None:
    lines = {line.stage: line for line in plan(workflow([1, 2, 3]), store)}
    assert (lines["numbers"].todo, lines["numbers"].at_most) == (3, False)
    assert (lines["double"].todo, lines["double"].at_most) == (1, True)
    assert lines["sum"].why == "behind double"
    assert list(store.list("")) == []


def test_growth_costs_only_what_was_added_and_the_reduce_behind_it(store: Store) -> None:
    execute(store, workflow([1, 2, 3]))
    execute(store, [Numbers({"numbers": [1, 2, 3, 4]})])
    assert todo(store, workflow([1, 2, 3, 4])) == {"numbers": (0, False), "double": (1, False), "sum": (1, True)}


def test_why_names_the_dotted_path_that_changed(store: Store) -> None:
    execute(store, workflow([1, 2]))
    stage = Double({"factor": "three"})
    whole = Action(
        "double/1", {"factor": "three"}, (resolve(Numbers({"numbers": [1, 2]}), [], store).manifest().version,)
    )
    assert why(stage, whole, store) == 'factor "two" → "three"'
    assert todo(store, workflow([1, 2], "three"))["double"] == (2, False)


def test_the_same_bytes_made_anew_stop_the_wave(store: Store) -> None:
    made = execute(store, workflow([1, 2]))
    again = execute(store, workflow([1, 2], "three"))
    assert again["double"].version == made["double"].version
    assert again["double"].records[0].key != made["double"].records[0].key
    assert again["sum"].only.key == made["sum"].only.key


def test_a_lost_record_is_made_again_and_nothing_else(store: Store) -> None:
    made = execute(store, workflow([1, 2, 3]))
    lost = made["double"].records[1]
    folder = Action("double/1", {"factor": "two"}, ()).place
    store.delete(f"records/{folder}/{lost.key}.0.json")
    assert todo(store, workflow([1, 2, 3]))["double"] == (1, False)
    assert execute(store, workflow([1, 2, 3]))["double"].version == made["double"].version


def test_only_without_its_inputs_is_an_error_that_says_what_to_run(store: Store) -> None:
    with pytest.raises(Refused, match="--until numbers"):
        execute(store, workflow([1, 2]), chosen(workflow([1, 2]), only="double"))


def test_until_takes_what_it_needs_and_no_more() -> None:
    assert chosen(workflow([1]), until="double") == {"numbers", "double"}
    assert chosen(workflow([1]), only="total") == {"sum"}
    with pytest.raises(Refused, match="Did you mean 'double'"):
        chosen(workflow([1]), until="doubel")


def test_a_failure_keeps_what_finished_and_skips_what_needs_it(store: Store) -> None:
    with pytest.raises(Refused, match="13 is not doubled"):
        execute(store, workflow([1, 13]))
    assert todo(store, workflow([1, 13]))["double"] == (1, False)


def test_the_first_of_two_records_stays(store: Store, tmp_path: Path) -> None:
    action = Action("double/1", {}, ())
    for text, name in (("first", "a"), ("second", "b")):
        out = tmp_path / name
        out.mkdir()
        (out / "n").write_text(text)
        won = commit(store, action, Record.of(action, out), out)
    assert store.get(f"objects/{won.sha('n')[:2]}/{won.sha('n')}") == b"first"


def test_stages_are_ordered_by_need_and_circles_are_refused() -> None:
    assert [stage.name for stage in order(reversed(workflow([1])))] == ["numbers", "double", "sum"]
    circle = [Double({}, name="a", needs=("b",)), Double({}, name="b", needs=("a",))]
    with pytest.raises(Refused, match="circle"):
        order(circle)


def test_differences_are_dotted_paths() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c 2 → 3", "d null → 4"]


def stage(kind: str, cpus: float, gpus: float = 0, workers: int = 1) -> Any:
    return SimpleNamespace(
        name="it", group="it", kind=kind, how=SimpleNamespace(cpus=cpus, gpus=gpus, workers=workers, fewest=workers)
    )


@pytest.mark.parametrize(
    ("asked", "nodes", "growth", "room"),
    [
        (stage("task", 5), [Node(4, 0, 16)], [], False),  # 64 CPUs, and none of the nodes has five
        (stage("task", 4), [Node(4, 0)], [], True),
        (stage("task", 0.1), [Node(0, 0)], [], False),  # a head without work of its own
        (stage("actor", 1, 1), [Node(64, 0), Node(0, 8)], [], False),  # the GPUs are not where the CPUs are
        (stage("actor", 1, 0.5), [Node(1, 0.5)], [], True),
        (stage("actor", 1, 1), [Node(2, 0)], [Node(2, 0, 4), Node(8, 1, 2)], True),
        (stage("fit", 8, 1, workers=9), [Node(72, 8)], [], False),
        (stage("fit", 8, 1, workers=16), [Node(72, 8, 2)], [], True),
        (stage("fit", 3, workers=4), [Node(4, 0, 3)], [], False),  # 12 CPUs, in which four threes do not fit
        (stage("fit", 8, 1, workers=128), [Node(72, 8)], [Node(72, 8, 16)], True),
        (stage("driver", 99), [Node(1, 0)], [], True),
        (stage("task", 99), [], [], True),  # nothing is known
    ],
)
def test_what_no_node_can_hold_is_an_error_and_not_a_wait(
    asked: Any, nodes: list[Node], growth: list[Node], room: bool
) -> None:
    with contextlib.nullcontext() if room else pytest.raises(Refused, match="too small: it wants"):
        check_room([asked], nodes, growth)


@pytest.mark.parametrize(
    ("cpus", "gpus", "actors"), [(1, 0, 16), (0.1, 0, 160), (1, 1, 2), (1, 0.25, 8), (8, 0.1, 2), (0, 1, 2), (99, 0, 1)]
)
def test_a_pool_has_as_many_actors_as_both_cpus_and_gpus_allow(cpus: float, gpus: float, actors: int) -> None:
    assert most_actors(ClusterInfo("", "", (Node(16, 2),), (), True), cpus, gpus) == actors
