"""Two nodes against one: a `download` that waits for its servers, on Ray, the same threads a node.

Run with `make bench` (Linux: hosts are addresses of loopback). A Ray cluster on this machine (tests/fixtures/nodes.py):
a head that takes no work, and two nodes of one CPU each. The servers answer 200 ms after they were asked, and few
threads ask, so that the processors of one machine hold both nodes. What is timed is the whole run of the stage by the
real executor, from looking up what is there to the manifest, into an empty store; Ray runs already, and its workers
have imported what they need. With one node, the CPU of the other is held by a task that sleeps; both cases take turns.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console as Terminal

from infra.cluster import connect, disconnect
from infra.records.manifest import Action, Manifest, Record
from infra.records.schemas import KEPT, LISTED
from infra.store.base import Store
from infra.store.opening import open_store
from infra.tracking.monitor import NullMonitor
from pipelines.download.stage import Download, DownloadHow, DownloadSpec
from pipelines.engine.console import Console
from pipelines.engine.execute import Execution
from tests.benchmarks.bench_download import HOSTS, rows
from tests.benchmarks.web import serving
from tests.fixtures.holding import ROOT
from tests.fixtures.nodes import nodes

DELAY_S, THREADS, SHARDS, ROWS = 0.2, 4, 8, 48
ROUNDS, LEAST = 3, 1.8


@dataclasses.dataclass(frozen=True)
class Slices:
    """Stage, in the place of `source`: slices of one length. Source's own differ by their rows' hashes, and eight of
    those would seldom be dealt evenly to two nodes."""

    spec: dict[str, int]
    """The port of all hosts."""
    name: str = "source"
    group: str = "source"
    version: int = 1
    needs: tuple[str, ...] = ()
    kind: str = "driver"
    how: Any = None

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        yield Action("source/1", self.spec, ())

    def setup(self) -> None:
        """Nothing to prepare."""

    def run(self, action: Action, store: Store, out: Path) -> Record:
        table, names = rows(SHARDS * ROWS, self.spec["port"]), [f"{number:05d}.parquet" for number in range(SHARDS)]
        for number, name in enumerate(names):
            pq.write_table(table.slice(number * ROWS, ROWS), out / name)
        return Record.of(action, out, states={LISTED: len(table)}, facts={"slices": names})


def sleep_while(there: Path, began: Path) -> None:
    """A task of Ray: holds its CPU as long as there is a file; it says by another that it has begun."""
    began.touch()
    while there.exists():
        time.sleep(0.05)


@contextmanager
def one_node_held(folder: Path) -> Iterator[None]:
    """One of two nodes takes no work within. Its worker stays, and with it what it has imported."""
    import ray

    there, began = folder / "there", folder / "began"
    there.touch()
    sleeping = ray.remote(num_cpus=1)(sleep_while).remote(there, began)
    try:
        while not began.exists():
            time.sleep(0.05)
        yield
    finally:
        there.unlink()
        ray.get(sleeping)
        began.unlink()


def seconds(port: int, folder: Path, info: Any) -> float:
    """How long the executor takes for the download of all slices, on the nodes that are free."""
    store = open_store(str(folder))
    how = DownloadHow(threads=THREADS, allow=("127.0.0.0/8",))
    source, download = Slices({"port": port}), Download(DownloadSpec(size=64), how)
    link, console = (info, NullMonitor()), Console([], Terminal(quiet=True))
    Execution(store, [source], lambda: link, console).run({source.name})
    began = time.perf_counter()
    made = Execution(store, [source, download], lambda: link, console).run({source.name, download.name})
    took = time.perf_counter() - began
    assert made[download.name].states == {KEPT: SHARDS * ROWS}
    assert len(made[download.name].records) == SHARDS
    shutil.rmtree(folder)
    return took


def test_two_nodes_are_nearly_twice_as_fast_as_one_where_servers_are_waited_for(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with nodes(2, environment) as cluster, serving(HOSTS, 0, delay_s=DELAY_S) as port:
        info = connect(cluster.address)
        try:
            assert info.cpus == 2
            for number in range(2):  # each worker imports what it needs
                seconds(port, tmp_path / f"warm-{number}", info)
            ratios = []
            for number in range(ROUNDS):
                took = {}
                for count in (1, 2) if number % 2 else (2, 1):
                    if count == 2:
                        took[count] = seconds(port, tmp_path / "store", info)
                    else:
                        with one_node_held(tmp_path):
                            took[count] = seconds(port, tmp_path / "store", info)
                ratios.append(took[1] / took[2])
                # What the delay alone allows: so many threads, each asking again as soon as it was answered.
                most = {count: count * THREADS / DELAY_S for count in took}
                shares = ", ".join(
                    f"{SHARDS * ROWS / took[count]:.1f} rows/s on {count} of at most {most[count]:.0f}"
                    for count in sorted(took)
                )
                print(f"\n{shares}: {ratios[-1]:.2f} ×", flush=True)
        finally:
            disconnect()
    ratio = statistics.median(ratios)
    print(f"two nodes against one, answers after {DELAY_S * 1000:.0f} ms: {ratio:.2f} ×", end=" ")
    print(f"({ROUNDS} rounds, {THREADS} threads a node, {SHARDS} shards of {ROWS} rows)", flush=True)
    assert ratio >= LEAST
