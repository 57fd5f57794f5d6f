"""Both kinds of store, for every test that takes `store_uri`."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["folder", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a new store may be opened: a folder that does not exist yet, and a bucket of a real S3 server."""
    return str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3_uri")
