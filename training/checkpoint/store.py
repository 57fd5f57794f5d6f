"""Checkpoints in the store, under the key of the fit: written whole, found newest first, believed only if intact.

    checkpoints/<key>/<samples, zero padded>-<lease number>/<rank>-of-<ranks>.safetensors
    checkpoints/<key>/<samples, zero padded>-<lease number>/manifest.json   written last, once all ranks have written

The manifest says what every file's digest is, and which part of which tensor lies in it: so it can be read by another
number of workers, whole or in shards. The lease number keeps two drivers apart, of which one believes that it still
holds the lease. No tensor is known here: the driver reads a finished model's files without importing torch.
What else lies under the key is not theirs: the request to stop, the snapshots of averages (averages.py).
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infra.documents import SCHEMA_VERSION, canonical, check_schema, digest, digest_file
from infra.errors import NotFound, Refused
from infra.store import Store
from training.job import Job

MANIFEST = "manifest.json"
RELEASE = "release/"
"""The last checkpoint holds the finished model alone, its files under this name."""
EARLIER = ("weights", "average", "optimiser")
"""Files of a checkpoint of one worker as they were before there were parts: <name>.safetensors, tensors whole."""
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
DTYPES |= {"I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
"""Types of numbers by their name in a safetensors header."""

_NAME = re.compile(r"\d+-\d+/")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Where a box of a tensor lies: under that key of that file."""

    file: str
    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: its type by torch's name, its shape, and the parts that make it up."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Written:
    """A file in the store."""

    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint: where it lies, how far it is, what its writer said, its files (read-only) and its tensors."""

    place: str
    samples: int
    head: dict[str, Any]
    files: dict[str, Path]
    tensors: dict[str, Stored] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one fit. `lease` numbers the holder that writes.

    keep: how many of the newest stay. best: the name of a metric of `head["metrics"]`; the checkpoint where it is least
    stays too. job: the digest of what is fitted (`job_identity`); a checkpoint of another job is passed over.
    told: called with the samples and the digest of each one that is committed here.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        lease: int = 0,
        *,
        keep: int = 2,
        best: str = "",
        job: str = "",
        told: Callable[[int, str], None] = lambda samples, digest: None,
    ) -> None:
        self.store, self._root, self._lease = store, f"checkpoints/{key}/", lease
        self._keep, self._best, self._job, self._told = keep, best, job, told

    def save(self, samples: int, folder: Path, head: dict[str, Any]) -> bool:
        """Puts the files below folder and commits them; False as `commit` and `put`."""
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        put = [self.put(samples, name, path) for name, path in files.items()]
        return self.commit(samples, head, [file for file in put if file], {}) if all(put) else False

    def put(self, samples: int, name: str, path: Path) -> Written | None:
        """Puts one file of a checkpoint; None, with a warning, where other bytes lie under this very name: an earlier
        attempt's damaged ones."""
        place = self._place(samples)
        written = Written(name, digest_file(path), path.stat().st_size)
        if self.store.put_new(place + name, path):
            return written
        log.warning("checkpoint %s: other bytes lie there already; it is not written", place)
        return None

    def commit(self, samples: int, head: dict[str, Any], files: list[Written], tensors: Mapping[str, Stored]) -> bool:
        """Puts the manifest with the digests of all files and head (JSON), and drops what need not stay.

        False, with a warning, where there is another manifest already.
        """
        place = self._place(samples)
        document = {
            "schema_version": SCHEMA_VERSION,
            "samples": samples,
            "head": head | ({"job": self._job} if self._job else {}),
            "files": {file.name: {"sha256": file.sha256, "bytes": file.bytes} for file in files},
            "tensors": {name: asdict(stored) for name, stored in tensors.items()},
        }
        said = document["digest"] = digest(canonical(document))
        if not self.store.put_new(place + MANIFEST, canonical(document)):
            log.warning("checkpoint %s: another one lies there already; it is not written", place)
            return False
        self._told(samples, said)
        self._retain()
        return True

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose files are all there and intact; damaged ones are passed over with a warning."""
        return self._first_intact(self._places())

    def _first_intact(self, places: Iterable[str]) -> Checkpoint | None:
        for place in places:
            try:
                return self.read(place)
            except (NotFound, Refused, ValueError, KeyError, TypeError) as error:
                log.warning("checkpoint %s is passed over: %s", place, error)
        return None

    def at(self, samples: int) -> Checkpoint | None:
        """The newest intact checkpoint of that many samples, if there is one."""
        return self._first_intact(place for place in self._places() if _age(place)[0] == samples)

    def read(self, place: str) -> Checkpoint:
        """The checkpoint of that place; raises NotFound or Refused where it is not whole, or not of this job."""
        document = self._document(place)
        said = document["head"].get("job", self._job)
        if self._job and said != self._job:
            raise Refused("it is of another job or other data")
        files = {}
        for name, about in document["files"].items():
            path = self.store.local(place + name)
            if path.stat().st_size != about["bytes"] or digest_file(path) != about["sha256"]:
                raise Refused(f"{name} is damaged")
            files[name] = path
        tensors = {name: _stored(about) for name, about in document.get("tensors", {}).items()}
        return Checkpoint(place, document["samples"], document["head"], files, tensors or _earlier(files))

    def discard(self) -> None:
        """Removes every checkpoint of this fit, once its record is committed."""
        self._remove(self._root)

    def _places(self) -> list[str]:
        """Committed checkpoints, newest first."""
        ends = f"/{MANIFEST}"
        found = [entry.name for entry in self.store.list(self._root) if entry.name.endswith(ends)]
        places = (name.removesuffix(MANIFEST) for name in found)
        return sorted((place for place in places if self._is_place(place)), key=_age, reverse=True)

    def _is_place(self, place: str) -> bool:
        return bool(_NAME.fullmatch(place.removeprefix(self._root)))

    def _document(self, place: str) -> dict[str, Any]:
        """A manifest; Refused where it does not have the digest that it says. (Those of earlier releases say none.)"""
        document = check_schema(json.loads(self.store.get(place + MANIFEST)), place)
        said = document.pop("digest", None)
        if said is not None and said != digest(canonical(document)):
            raise Refused(f"{MANIFEST} is damaged")
        return document

    def _place(self, samples: int) -> str:
        return f"{self._root}{samples:012d}-{self._lease}/"

    def _retain(self) -> None:
        """Keeps the newest, those that they may return to (`head["anchor"]`) and the best; removes the rest, and what
        killed writers left half-written before those."""
        places = self._places()
        kept = places[: self._keep]
        oldest = _age(kept[-1])
        best = self._least(places) if self._best else None
        below = (entry.name.removeprefix(self._root).partition("/") for entry in self.store.list(self._root))
        there = {f"{self._root}{folder}/" for folder, slash, _ in below if slash}
        anchors = {self._head(place).get("anchor") for place in kept}
        needed = {place for place in places if _age(place)[0] in anchors}
        for place in there - {*kept, best} - needed:
            if self._is_place(place) and _age(place) < oldest:
                self._remove(place)

    def _least(self, places: list[str]) -> str | None:
        """The checkpoint whose metric is least, of those that say it."""
        scores = {}
        for place in places:
            score = self._head(place).get("metrics", {}).get(self._best)
            if score is not None:
                scores[place] = float(score)
        return min(scores, key=scores.__getitem__, default=None)

    def _head(self, place: str) -> dict[str, Any]:
        """What the writer of a checkpoint said; empty where its manifest is damaged."""
        try:
            return dict(self._document(place)["head"])
        except (NotFound, Refused, ValueError, KeyError):
            return {}

    def _remove(self, place: str) -> None:
        names = [entry.name for entry in self.store.list(place)]
        for name in sorted(names, key=lambda name: not name.endswith(MANIFEST)):  # no manifest without its files
            self.store.delete(name)


def _age(place: str) -> tuple[int, int]:
    samples, _, lease = place.rstrip("/").rpartition("/")[2].partition("-")
    return int(samples), int(lease)


def _stored(about: dict[str, Any]) -> Stored:
    parts = (Part(one["file"], one["key"], tuple(one["offsets"]), tuple(one["sizes"])) for one in about["parts"])
    return Stored(about["dtype"], tuple(about["shape"]), tuple(parts))


def _earlier(files: dict[str, Path]) -> dict[str, Stored]:
    """The tensors of a checkpoint whose manifest does not name them: one worker's, by the headers of its files."""
    found = {}
    for name in EARLIER:
        if path := files.get(f"{name}.safetensors"):
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            for key, about in header.items():
                if key != "__metadata__":
                    shape = tuple(about["shape"])
                    part = Part(path.name, key, (0,) * len(shape), shape)
                    found[f"{name}.{key}"] = Stored(DTYPES[about["dtype"]], shape, (part,))
    return found


def job_identity(job: Job) -> str:
    """The digest of all that decides a fit: configuration of model and training, versions of the data's manifests."""
    return digest(canonical({"kind": job.kind, "model": job.model, "train": job.train, "data": job.data}))


def is_finished(checkpoint: Checkpoint, job: Job) -> bool:
    """Whether that checkpoint is the finished model's."""
    return checkpoint.samples == job.config.steps * job.config.batch


def deliver_model(store: Store, job: Job, out: Path) -> dict[str, Any] | None:
    """Copies the finished model's files to out and returns its facts; None if it is not finished."""
    found = Checkpoints(store, job.key).newest()
    if found is None or not is_finished(found, job):
        return None
    for name, path in found.files.items():
        target = out / name.removeprefix(RELEASE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return dict(found.head["facts"])
