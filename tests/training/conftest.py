"""Fixtures of training's tests."""

from __future__ import annotations

from tests.fixtures.s3 import s3_endpoint, s3_uri  # noqa: F401  fixtures are found by their names here
