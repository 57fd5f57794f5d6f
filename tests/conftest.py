"""How the tests are shared out where several processes run them, a file to each (`pytest -n 2 --dist loadfile`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from filelock import FileLock

LONGEST, ALONE = "test_chain.py", "test_cluster.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file comes first, and the others that start Ray last, of which the last waits for it."""
    ray = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: (item.path.name != LONGEST, item.path in ray, item.path.name == ALONE))


@pytest.fixture(scope="module", autouse=True)
def only_ray(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """At most two files at a time start Ray, the longest and one other; one that hands jobs to a local Ray is alone:
    of two instances on a machine one has the port of the agents that take jobs."""
    if not any(item.get_closest_marker("ray") for item in request.session.items if item.path == request.path):
        yield
        return
    places = {LONGEST: ("first",), ALONE: ("first", "second")}.get(request.path.name, ("second",))
    with ExitStack() as held:
        for place in places:
            held.enter_context(FileLock(tmp_path_factory.getbasetemp().parent / f"ray-{place}.lock"))
        yield
