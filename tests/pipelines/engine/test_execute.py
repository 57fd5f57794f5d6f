"""Stages on a real Ray: tasks, actor pools, and what happens when one of them dies."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.cluster import ClusterInfo, Node
from infra.documents import digest
from infra.errors import Refused, Stopped
from infra.records.manifest import Action, Manifest, Record
from infra.store.base import Store
from infra.store.opening import open_store
from infra.tracking.mlflow import open_client
from infra.tracking.monitor import Monitor, NullMonitor
from infra.tracking.uri import default_uri
from pipelines.engine.console import Console
from pipelines.engine.execute import Execution
from tests.pipelines.engine.test_graph import Double, Numbers

pytestmark = pytest.mark.ray


@dataclasses.dataclass(frozen=True)
class Fragile(Double):
    """Doubles, but the first process that meets 7 dies as a preempted node would."""

    def run(self, action: Action, store: Store, out: Path) -> Record:
        from infra.records.objects import object_name

        if store.get(object_name(action.inputs[0])) == b"7" and not store.exists("died"):
            store.put_new("died", b"yes")
            os._exit(1)
        return super().run(action, store, out)


@dataclasses.dataclass(frozen=True)
class Slow(Double):
    """Doubles, two seconds after it said that it began."""

    def run(self, action: Action, store: Store, out: Path) -> Record:
        store.put_new(f"began/{action.key}", b"yes")
        time.sleep(2)
        return super().run(action, store, out)


@pytest.fixture(scope="module")
def link() -> Iterator[Any]:
    """A Ray of two CPUs for all tests of this file."""
    import ray

    often = {"metrics_report_interval_ms": 500}
    ray.init("local", num_cpus=2, log_to_driver=False, logging_level="ERROR", _system_config=often)
    monitor = NullMonitor()
    yield lambda: (ClusterInfo("", "", (Node(2, 0),), (), True), monitor)
    ray.shutdown()


def execute(store: Store, link: Any, stages: list[Any]) -> dict[str, Manifest]:
    return Execution(store, stages, link, Console([])).run({stage.name for stage in stages})


@pytest.mark.parametrize("kind", ["task", "actor"])
def test_every_way_of_running_gives_the_same_records(tmp_path: Path, link: Any, kind: str) -> None:
    here = open_store(str(tmp_path / "here"))
    there = open_store(str(tmp_path / "there"))
    how = SimpleNamespace(cpus=1)
    numbers = Numbers({"numbers": [1, 2, 3, 4, 5]})
    expected = execute(here, link, [numbers, Double({})])["double"]
    found = execute(there, link, [numbers, Double({}, kind=kind, how=how)])["double"]
    assert found.version == expected.version
    assert found.records == expected.records
    _, monitor = link()
    told = monitor.board()["double"]
    assert (told["done"], told["total"], told["rows"]) == (5, 5, 5)


@dataclasses.dataclass(frozen=True)
class Rows(Double):
    """Ten rows a shard, of which one is lost."""

    def run(self, action: Action, store: Store, out: Path) -> Record:
        made = super().run(action, store, out)
        return Record.of(action, out, states={"kept": 9, "http_404": 1}, facts=made.facts)


@pytest.mark.slow
def test_rows_and_rates_reach_mlflow_and_rays_own_metrics_endpoint(tmp_path: Path, link: Any) -> None:
    info, _ = link()
    uri = default_uri(str(tmp_path / "tracking"))
    monitor = Monitor.launch(uri, "unclip", "run", "store")
    stages = [Numbers({"numbers": [1, 2, 3]}), Rows({"factor": 2}, kind="task", how=SimpleNamespace(cpus=1))]
    made = execute(open_store(str(tmp_path / "store")), lambda: (info, monitor), stages)["double"]
    expected = {
        ("ray_unclip_shards", ""): 3,
        ("ray_unclip_rows_per_s", ""): 0,  # it has ended
        ("ray_unclip_success_rate", ""): 0.9,
        ("ray_unclip_rows_total", "kept"): 27,
        ("ray_unclip_rows_total", "http_404"): 3,
    }
    until = time.monotonic() + 60
    while (told := scraped("double")) != expected and time.monotonic() < until:
        time.sleep(0.5)
    assert told == expected
    assert monitor.flush(300), monitor.trouble()
    assert monitor.close(60)

    (run,) = open_client(uri).search_runs(["1"], "tags.`unclip.stage` = 'double'")
    values = run.data.metrics
    assert values.pop("rows_per_s") > 0
    assert values == {"shards": 3, "rows": 30, "success_rate": 0.9, "rows.kept": 27, "rows.http_404": 3}
    history = open_client(uri).get_metric_history(run.info.run_id, "rows")
    assert (history[-1].step, history[-1].value) == (3, made.rows)
    assert run.data.params == {"factor": "2"}
    assert run.info.status == "FINISHED"


def scraped(stage: str) -> dict[tuple[str, str], float]:
    """(metric, reason) → value, of a stage, as Prometheus would read it from the node's endpoint."""
    import ray
    from prometheus_client.parser import text_string_to_metric_families

    (node,) = ray.nodes()
    with urllib.request.urlopen(
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10
    ) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        (one.name, one.labels.get("reason", "")): one.value
        for family in families
        for one in family.samples
        if one.name.startswith("ray_unclip_") and one.labels["stage"] == stage
    }


@pytest.mark.parametrize("kind", ["task", "actor"])
def test_a_worker_that_dies_is_replaced_and_its_shard_done(tmp_path: Path, link: Any, kind: str) -> None:
    store = open_store(str(tmp_path / "store"))
    stages = [Numbers({"numbers": [5, 6, 7, 8]}), Fragile({}, kind=kind, how=SimpleNamespace(cpus=1))]
    assert execute(store, link, stages)["double"].rows == 4
    assert store.exists("died")


@pytest.mark.parametrize("kind", ["task", "actor"])
def test_a_refusal_far_away_is_told_here_in_its_own_words(tmp_path: Path, link: Any, kind: str) -> None:
    store = open_store(str(tmp_path / "store"))
    stages = [Numbers({"numbers": [12, 13]}), Double({}, kind=kind, how=SimpleNamespace(cpus=1))]
    with pytest.raises(Refused, match="double: 13 is not doubled"):
        execute(store, link, stages)


@dataclasses.dataclass(frozen=True)
class Failing(Double):
    """Dies each time, or finds a full disk."""

    def run(self, action: Action, store: Store, out: Path) -> Record:
        if self.how.full:
            Path("/dev/full").write_bytes(b"no room for this")
        if action.inputs == (digest(b"0"),):
            return super().run(action, store, out)
        os._exit(1)


@dataclasses.dataclass(frozen=True)
class Poisoned(Double):
    """Dies each time of 7, unless it takes care."""

    def carefully(self) -> Poisoned:
        return dataclasses.replace(self, how=SimpleNamespace(cpus=1, care=True))

    def run(self, action: Action, store: Store, out: Path) -> Record:
        if action.inputs == (digest(b"7"),) and not self.how.care:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().run(action, store, out)


@pytest.mark.slow
def test_a_shard_that_goes_on_ending_its_workers_is_done_with_care(
    tmp_path: Path, link: Any, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = (open_store(str(tmp_path / name)) for name in ("here", "there"))
    numbers = Numbers({"numbers": [5, 7]})
    made = execute(here, link, [numbers, Poisoned({}, kind="task", how=SimpleNamespace(cpus=1, care=False))])["double"]
    assert made.version == execute(there, link, [numbers, Double({})])["double"].version
    assert "double: shard 2 of 2 ended its workers; it is done again, picture by picture" in caplog.text


@pytest.mark.parametrize("kind", ["task", "actor"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_full_disk_is_told_without_a_traceback(
    tmp_path: Path, link: Any, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    stages = [Numbers({"numbers": [1]}), Failing({}, kind=kind, how=SimpleNamespace(cpus=1, full=True))]
    with pytest.raises(Refused, match=r"No space left on device\. Make room there, then run again") as caught:
        execute(open_store(str(tmp_path / "store")), link, stages)
    assert caught.value.code == 5
    assert not caplog.records


@pytest.mark.slow
def test_a_shard_that_kills_each_worker_is_told_without_a_traceback(
    tmp_path: Path, link: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stages = [Numbers({"numbers": [0, 1]}), Failing({}, kind="task", how=SimpleNamespace(cpus=1, full=False))]
    with pytest.raises(Refused, match=r"double: shard 2 of 2 ended its worker 3 times in a row \(WorkerC") as caught:
        execute(open_store(str(tmp_path / "store")), link, stages)
    assert caught.value.code == 5
    assert not caplog.records


def test_a_stop_gives_up_the_shards_in_flight(tmp_path: Path, link: Any) -> None:
    store = open_store(str(tmp_path / "store"))
    work = Execution(
        store, [Numbers({"numbers": [1]}), Slow({}, kind="task", how=SimpleNamespace(cpus=1))], link, Console([])
    )

    def stop() -> None:
        while not list(store.list("began/")):
            time.sleep(0.02)
        work.stop()

    threading.Thread(target=stop).start()
    with pytest.raises(Stopped):
        work.run({"numbers", "double"})
    time.sleep(2)
    assert [entry.name.split("/")[1] for entry in store.list("records/")] == ["numbers-1"]
