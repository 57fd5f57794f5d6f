"""Fixtures for all tests, and how the tests are shared out where several processes run them (`pytest -n 3`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout
from xdist.scheduler import LoadScopeScheduling

# In one conftest, the one for all: a fixture is another one in each conftest that imports it, a session's too.
from tests.fixtures.disk import disk  # noqa: F401
from tests.fixtures.faulty_s3 import proxy  # noqa: F401
from tests.fixtures.s3 import s3_endpoint, s3_server, s3_uri  # noqa: F401

HERE = Path(__file__).parent
STOPPED = "chain/test_chain_stopped.py"
FIRST = (
    "chain/test_chain.py",
    f"{STOPPED}::test_two_runs_at_once_both_end_well_and_train_nothing_twice",
    "training/test_loop.py",
    "training/parallel/test_modes.py",
    "training/test_launch.py",
    "training/parallel/test_fsdp.py",
    "pipelines/versions/test_algebra.py",
    STOPPED,
    "training/test_tracked.py",
    "infra/store/test_s3_faults.py",
    "training/test_interrupt.py",
    "training/optim/test_precision.py",
    "training/optim/test_averages.py",
    "pipelines/engine/test_killed.py",
)
"""What takes half a minute or more, the longest first, and what shares a machine badly not at once."""
ALONE = "infra/test_cluster.py"
PLACES = ("first", "second")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is long comes first, and the other files that start Ray last, of which the last waits for them."""
    ray = {item.path for item in items if item.get_closest_marker("ray")}

    def place(item: pytest.Item) -> tuple[int, bool, bool]:
        name = item.path.relative_to(HERE).as_posix()
        begin = next((n for n, first in enumerate(FIRST) if first in (name, f"{name}::{item.name}")), len(FIRST))
        return begin, item.path in ray, name == ALONE

    items.sort(key=place)


class ByFile(LoadScopeScheduling):
    """One process runs a file, whose tests share what they build; but of the runs that are stopped each is by itself,
    since together they would take longer than all else."""

    def _split_scope(self, nodeid: str) -> str:
        name = nodeid.split("::")[0]
        return nodeid if name.endswith(STOPPED) else name


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile | None:
    return ByFile(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="module", autouse=True)
def only_ray(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """At most two files at a time start Ray, and one that hands jobs to a local Ray is alone: of two instances on a
    machine one has the port of the agents that take jobs."""
    if not any(item.get_closest_marker("ray") for item in request.session.items if item.path == request.path):
        yield
        return
    folder = tmp_path_factory.getbasetemp().parent
    places = [FileLock(folder / f"ray-{place}.lock") for place in PLACES]
    with ExitStack() as held:
        if request.path.match(ALONE):
            for place in places:
                held.enter_context(place)
        else:
            held.enter_context(free(places))
        yield


def free(places: list[FileLock]) -> FileLock:
    """Whichever of the locks is free first, taken; its context gives it back."""
    while True:
        for place in places:
            try:
                place.acquire(timeout=0)
            except Timeout:
                continue
            return place
        time.sleep(0.2)
