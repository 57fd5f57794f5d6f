"""Checkpoints in the store, under the key of the fit: written whole, found newest first, believed only if intact.

    checkpoints/<key>/<samples, zero padded>-<lease number>/<file>
    checkpoints/<key>/<samples, zero padded>-<lease number>/manifest.json   digests of the files, written last

What else lies under the key is not theirs: the request to stop, the snapshots of averages (averages.py).

The lease number keeps two drivers apart, of which one believes that it still holds the lease. No tensor is known here:
the driver reads a finished model's files without importing torch.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import Refused
from infra.manifest import SCHEMA_VERSION, canonical, check_schema, digest_file
from infra.store import NotFound, Store
from training.job import Job

MANIFEST = "manifest.json"
KEPT = 2
RELEASE = "release/"
"""The last checkpoint holds the finished model alone, its files under this name."""

_NAME = re.compile(r"\d+-\d+/")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint: where it lies, how far it is, what its writer said, and its files (read-only) by name."""

    place: str
    samples: int
    head: dict[str, Any]
    files: dict[str, Path]


class Checkpoints:
    """The checkpoints of one fit. `lease` numbers the holder that writes."""

    def __init__(self, store: Store, key: str, lease: int = 0) -> None:
        self._store, self._root, self._lease = store, f"checkpoints/{key}/", lease

    def save(self, samples: int, folder: Path, head: dict[str, Any]) -> bool:
        """Puts the files below folder, then the manifest with their digests and head (JSON); keeps the newest two.

        False, with a warning, where other bytes lie under this very name: an earlier attempt's damaged ones.
        """
        place = f"{self._root}{samples:012d}-{self._lease}/"
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        sums = {name: {"sha256": digest_file(path), "bytes": path.stat().st_size} for name, path in files.items()}
        manifest = canonical({"schema_version": SCHEMA_VERSION, "samples": samples, "head": head, "files": sums})
        put = all(self._store.put_new(place + name, path) for name, path in files.items())
        if not (put and self._store.put_new(place + MANIFEST, manifest)):
            log.warning("checkpoint %s: other bytes lie there already; it is not written", place)
            return False
        self._retain()
        return True

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose files are all there and intact; damaged ones are passed over with a warning."""
        for place in self._places():
            try:
                return self.read(place)
            except (NotFound, Refused, ValueError, KeyError) as error:
                log.warning("checkpoint %s is passed over: %s", place, error)
        return None

    def read(self, place: str) -> Checkpoint:
        """The checkpoint of that place; raises NotFound or Refused where it is not whole."""
        document = check_schema(json.loads(self._store.get(place + MANIFEST)), place)
        files = {}
        for name, said in document["files"].items():
            path = self._store.local(place + name)
            if path.stat().st_size != said["bytes"] or digest_file(path) != said["sha256"]:
                raise Refused(f"{name} is damaged")
            files[name] = path
        return Checkpoint(place, document["samples"], document["head"], files)

    def discard(self) -> None:
        """Removes every checkpoint of this fit, once its record is committed."""
        self._remove(self._root)

    def _places(self) -> list[str]:
        """Committed checkpoints, newest first."""
        ends = f"/{MANIFEST}"
        found = [entry.name for entry in self._store.list(self._root) if entry.name.endswith(ends)]
        places = (name.removesuffix(MANIFEST) for name in found)
        return sorted((place for place in places if self._is_place(place)), key=_age, reverse=True)

    def _retain(self) -> None:
        """Keeps the newest two, and removes the rest and what killed writers left half-written before those."""
        places = self._places()
        kept, oldest = places[:KEPT], _age(places[:KEPT][-1])
        below = (entry.name.removeprefix(self._root).partition("/") for entry in self._store.list(self._root))
        there = {f"{self._root}{folder}/" for folder, slash, _ in below if slash}
        for place in there - set(kept):
            if self._is_place(place) and _age(place) < oldest:
                self._remove(place)

    def _is_place(self, place: str) -> bool:
        return bool(_NAME.fullmatch(place.removeprefix(self._root)))

    def _remove(self, place: str) -> None:
        names = [entry.name for entry in self._store.list(place)]
        for name in sorted(names, key=lambda name: not name.endswith(MANIFEST)):  # no manifest without its files
            self._store.delete(name)


def _age(place: str) -> tuple[int, int]:
    samples, _, lease = place.rstrip("/").rpartition("/")[2].partition("-")
    return int(samples), int(lease)


def finished(checkpoint: Checkpoint, job: Job) -> bool:
    """Whether that checkpoint is the finished model's."""
    return checkpoint.samples == job.config.steps * job.config.batch


def deliver(store: Store, job: Job, out: Path) -> dict[str, Any] | None:
    """Copies the finished model's files to out and returns its facts; None if it is not finished."""
    found = Checkpoints(store, job.key).newest()
    if found is None or not finished(found, job):
        return None
    for name, path in found.files.items():
        target = out / name.removeprefix(RELEASE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return dict(found.head["facts"])
