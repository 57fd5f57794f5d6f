"""Fits as a run sees them: let in by their size, under a lease, stopped, settled. No Ray: they sleep and write."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.cluster import ClusterInfo, Node
from infra.errors import Refused, Stopped
from infra.process import Process
from infra.records.commits import commit
from infra.records.manifest import Action, Manifest, Record
from infra.records.objects import object_name
from infra.store.base import Store
from infra.store.opening import open_store
from infra.tracking.monitor import NullMonitor
from pipelines.engine.console import Console
from pipelines.engine.execute import Execution
from pipelines.fit.stage import FitSpec
from training.launch import discard

pytestmark = pytest.mark.timeout(60)  # a run that waits for ever is what several of these are about


@dataclass(frozen=True)
class Toy:
    """Leaves a checkpoint, works until `seconds` are over or it is asked to stop, as a real fit does, and writes."""

    name: str
    seconds: float = 0.0
    cpus: float = 1
    spec: FitSpec = field(default_factory=lambda: FitSpec({}, {}))
    needs: tuple[str, ...] = ()
    version: int = 1
    kind: str = "fit"

    @property
    def group(self) -> str:
        return self.name

    @property
    def how(self) -> Any:
        return SimpleNamespace(workers=1, fewest=1, cpus=self.cpus, gpus=0, nice=0)

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        yield Action(f"{self.name}/1", {}, tuple(manifest.version for manifest in inputs))

    def setup(self) -> None: ...

    def fit(self, action: Action, store: Store, out: Path, monitor: Any, lease: int) -> Record:
        store.put_new(f"checkpoints/{action.key}/000000000001-{lease}/manifest.json", b"{}")
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            if store.exists(f"checkpoints/{action.key}/stop-{lease}"):
                raise Stopped("stopped at step 1")
            time.sleep(0.02)
        (out / "model").write_text(self.name)
        return Record.of(action, out, facts={"out": str(out)})

    def settle(self, action: Action, store: Store) -> None:
        discard(store, action.key)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def execution(store: Store, *stages: Any, lease_s: float = 60) -> Execution:
    """A run on a cluster of two CPUs and no GPU."""
    link = ClusterInfo("", "", (Node(2, 0),), (), True), NullMonitor()
    return Execution(store, stages, lambda: link, Console([]), lease_s=lease_s)


def run(work: Execution) -> dict[str, Manifest]:
    return work.run({stage.name for stage in work.stages})


@dataclass(frozen=True)
class Broken(Toy):
    """A fit that fails, with the exit code that is its version."""

    def fit(self, action: Action, store: Store, out: Path, monitor: Any, lease: int) -> Record:
        time.sleep(self.seconds)
        raise Refused(f"the {self.name} is broken", code=self.version)


def soon(what: Callable[[], Any]) -> None:
    """Waits until that is so."""
    until = time.monotonic() + 20
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def checkpoints(store: Store) -> list[str]:
    return [entry.name for entry in store.list("checkpoints/")]


def test_all_that_is_too_large_for_the_cluster_is_told_once_before_anything_is_made(store: Store) -> None:
    work = execution(store, Toy("clip"), Toy("prior", cpus=8, needs=("clip",)), Toy("decoder", cpus=9))
    with pytest.raises(Refused) as caught:
        run(work)
    assert str(caught.value) == (
        "the cluster is too small: prior wants 8 CPUs for 1 worker, decoder wants 9 CPUs for 1 worker. Its nodes: 1 "
        "with 2 CPUs. Ask for less (prior.workers, prior.cpus, decoder.workers, decoder.cpus; --set KEY=VALUE), or "
        "connect to a larger cluster (--address)."
    )
    assert caught.value.code == 2
    assert not list(store.list("records/"))


def test_what_is_done_may_have_been_too_large_for_this_cluster(store: Store) -> None:
    run(execution(store, Toy("prior", cpus=2)))
    made = run(execution(store, Toy("prior", cpus=64), Toy("decoder")))
    assert set(made) == {"prior", "decoder"}


def test_what_is_foreseen_to_find_no_room_does_not_start_ray(store: Store) -> None:
    def connect() -> Any:
        raise AssertionError("Ray was started")

    work = Execution(store, [Toy("prior", cpus=3)], connect, Console([]), foreseen=[Node(2, math.inf)])
    with pytest.raises(Refused, match=r"prior wants 3 CPUs .* Its nodes: 1 with 2 CPUs\."):
        run(work)


def test_a_fit_too_large_for_the_cluster_does_not_bar_a_run_that_leaves_it_out(store: Store) -> None:
    assert set(execution(store, Toy("clip"), Toy("decoder", cpus=8)).run({"clip"})) == {"clip"}


def test_a_stop_reaches_the_fit_that_runs(store: Store) -> None:
    work = execution(store, Toy("prior", 50))
    threading.Thread(target=lambda: (soon(lambda: checkpoints(store)), work.stop())).start()
    with pytest.raises(Stopped, match="goes on from there"):
        run(work)


def test_a_stop_reaches_the_fit_that_waits_for_its_turn(store: Store) -> None:
    work = execution(store, Broken("prior", 2, cpus=2), Broken("decoder", 2, cpus=2))
    failed: list[BaseException] = []

    def stop() -> None:
        soon(lambda: list(store.list("leases/")))
        work.stop()
        soon(lambda: work.failures)
        failed.extend(work.failures.values())

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Refused):
        run(work)
    thread.join()
    assert [type(error) for error in failed] == [Stopped]  # at once, though the one that runs does not listen


def test_what_failed_is_told_after_a_stop_too(store: Store) -> None:
    work = execution(store, Toy("prior", 50), Broken("decoder", version=4), Toy("bundle", needs=("decoder",)))
    threading.Thread(target=lambda: (soon(lambda: "decoder" in work.failures), work.stop())).start()
    with pytest.raises(Refused) as caught:
        run(work)
    told = str(caught.value).splitlines()
    assert told[0] == "decoder: the decoder is broken"
    assert told[1].startswith("stopped. ")
    assert len(told) == 2
    assert caught.value.code == 4
    assert not isinstance(caught.value, Stopped)


def test_all_that_failed_is_told_and_the_first_gives_the_exit_code(store: Store) -> None:
    work = execution(store, Broken("prior", version=3), Broken("decoder", 0.5, version=5))
    with pytest.raises(Refused) as caught:
        run(work)
    assert str(caught.value).splitlines() == ["prior: the prior is broken", "decoder: the decoder is broken"]
    assert caught.value.code == 3


def test_a_run_that_lost_its_lease_stops_its_fit_and_takes_the_other_runs_model(store: Store) -> None:
    stage = Toy("prior", 50)
    (action,) = stage.actions()
    work = execution(store, stage, lease_s=1)

    def take_over() -> None:
        soon(lambda: checkpoints(store))
        holder = {"schema_version": 1, "owner": "another run", "ttl_s": 60, "holder": asdict(Process.this())}
        store.put_new(f"leases/{action.key}/00000002.json", json.dumps(holder).encode())
        soon(lambda: store.exists(f"checkpoints/{action.key}/stop-1"))
        with store.scratch() as out:
            (out / "model").write_text("the other run's")
            commit(store, action, Record.of(action, out), out)

    thread = threading.Thread(target=take_over)
    thread.start()
    made = run(work)["prior"].only
    thread.join()
    assert store.get(object_name(made.sha("model"))) == b"the other run's"
    assert checkpoints(store)  # they are the other run's to settle


def test_checkpoints_that_a_killed_driver_left_go_with_the_next_run_of_their_stage(store: Store) -> None:
    prior, bundle = Toy("prior"), Toy("bundle", needs=("prior",))
    run(execution(store, prior))
    assert checkpoints(store) == []
    (action,) = prior.actions()
    for name in ("000000000007-1/model.safetensors", "000000000007-1/manifest.json"):
        store.put_new(f"checkpoints/{action.key}/{name}", b"left")
    execution(store, prior, bundle).run({"bundle"})
    assert len(checkpoints(store)) == 2
    run(execution(store, prior, bundle))
    assert checkpoints(store) == []


def test_a_fit_writes_where_the_store_takes_it_without_a_copy(store: Store) -> None:
    made = run(execution(store, Toy("prior")))["prior"].only
    assert Path(made.facts["out"]).is_relative_to(Path(store.uri) / "tmp")
