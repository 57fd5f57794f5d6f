"""Fixtures of training's tests."""

from __future__ import annotations

from tests.fixtures.disk import disk  # noqa: F401  fixtures are found by their names here
from tests.fixtures.faulty_s3 import proxy  # noqa: F401
from tests.fixtures.s3 import s3_endpoint, s3_uri  # noqa: F401
