"""Fixtures for all tests, and how the tests are shared out where several processes run them, a file to each
(`pytest -n 3 --dist loadfile`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

# In one conftest, the one for all: a fixture is another one in each conftest that imports it, a session's too.
from tests.fixtures.disk import disk  # noqa: F401
from tests.fixtures.faulty_s3 import proxy  # noqa: F401
from tests.fixtures.s3 import s3_endpoint, s3_server, s3_uri  # noqa: F401

HERE = Path(__file__).parent
CHAINS = ("chain/test_chain.py", "chain/test_chain_stopped.py")
LONG = (
    "training/parallel/test_modes.py",
    "training/test_loop.py",
    "training/parallel/test_fsdp.py",
    "training/test_tracked.py",
    "training/optim/test_precision.py",
    "training/optim/test_averages.py",
    "pipelines/versions/test_algebra.py",
    "infra/store/test_s3_faults.py",
    "training/test_interrupt.py",
    "pipelines/engine/test_killed.py",
)
"""Files without Ray that take half a minute or more, the longest first."""
ALONE = "infra/test_cluster.py"
PLACES = ("first", "second")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, and the others that start Ray last, of which the last waits for them."""
    ray = {item.path for item in items if item.get_closest_marker("ray")}
    begin = [*CHAINS, *LONG]

    def place(item: pytest.Item) -> tuple[int, bool, bool]:
        name = item.path.relative_to(HERE).as_posix()
        return begin.index(name) if name in begin else len(begin), item.path in ray, name == ALONE

    items.sort(key=place)


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
