"""What lies in the store, as a folder that models are read from."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.records.manifest import Manifest
from infra.records.objects import object_name
from infra.store.base import Store


@contextmanager
def unpacked(store: Store, version: str) -> Iterator[Path]:
    """A folder with the files of a manifest's only record."""
    with tempfile.TemporaryDirectory(prefix="unclip-") as name:
        for file, content in Manifest.load(store, version).only.files.items():
            path = Path(name) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(store.local(object_name(content.sha256)).absolute())
        yield Path(name)
