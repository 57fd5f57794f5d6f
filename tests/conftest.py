"""How the tests are shared out where several processes run them (`pytest -n 2 --dist loadgroup`)."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests stay together, for the sake of what they share; all that start Ray are one group, and the first.

    Two instances of Ray on one machine want the same port for their job agents, and the group is half of all the work.
    """
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
