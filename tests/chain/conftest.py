"""Fixtures of whole runs."""

from __future__ import annotations

from tests.fixtures.tiny_run import copy, finished  # noqa: F401  fixtures are found by their names here
