"""Fixtures of releases that tests may harm."""

from __future__ import annotations

from tests.fixtures.hostile import folder, parts  # noqa: F401  fixtures are found by their names here
