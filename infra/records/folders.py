"""A record as a folder: its files under their own names, as links or copies."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from infra.documents import digest_file
from infra.errors import Refused
from infra.records.manifest import Manifest, Record
from infra.records.objects import object_name

if TYPE_CHECKING:
    from infra.store import Store


def materialise(store: Store, record: Record, folder: Path, *, verify: bool = True) -> Path:
    """Puts a record's files under their own names into a folder, which is made; returns it.

    verify: each file's SHA-256 is computed anew, and it becomes a hard link or a copy, fit to be part of another
    record. Without it files are symbolic links to what lies in the store, to be read only. Raises Refused, code 5, for
    a damaged file: what is made of it would carry a digest of its own, and nobody would see the damage again.
    """
    for name, file in record.files.items():
        target, source = folder / name, store.local(object_name(file.sha256))
        if verify and digest_file(source) != file.sha256:
            raise Refused(
                f"{object_name(file.sha256)} ({name}) in the store is damaged. Delete it and the record that names it, "
                "or put an undamaged copy in its place, and run again.",
                code=5,
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        if not verify:
            target.symlink_to(source.absolute())
            continue
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
    return folder


@contextmanager
def materialised(store: Store, version: str, stage: str = "") -> Iterator[Path]:
    """A temporary folder of links to the files of a manifest's only record; it goes when the context ends."""
    with tempfile.TemporaryDirectory(prefix="unclip-") as name:
        yield materialise(store, Manifest.load(store, version, stage).only, Path(name), verify=False)
