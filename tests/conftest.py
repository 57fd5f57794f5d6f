"""How the tests are shared out where several processes run them, a file to each (`pytest -n 2 --dist loadfile`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from filelock import FileLock

LONGEST = "test_chain.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file comes first, and the others that start Ray last: by then it is done."""
    ray = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: (item.path.name != LONGEST, item.path in ray))


@pytest.fixture(scope="module", autouse=True)
def only_ray(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One file at a time starts Ray: two instances on one machine want the same port for their job agents."""
    if not any(item.get_closest_marker("ray") for item in request.session.items if item.path == request.path):
        yield
        return
    with FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock"):
        yield
