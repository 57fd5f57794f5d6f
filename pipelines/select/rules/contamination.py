"""The rule that keeps an evaluation's pictures out of training."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from infra.errors import Refused
from pipelines.download import SUFFIXES, picture
from pipelines.select.rules.base import (
    COSINE,
    EMBEDDING,
    NOT_IN_KEY,
    PHASH,
    FileRule,
    check_pinned,
    digest_of_files,
    numbers,
    unit_embeddings,
)
from pipelines.select.rules.hamming import MOST, hashes, near, split
from pipelines.select.rules.image import phash
from unclip.config import Range

_ROWS = 4096  # rows compared at a time


@dataclass(frozen=True, kw_only=True)
class Contamination(FileRule):
    """Rejects pictures of an evaluation set, so that what is measured was not trained on.

    By hash, in filter: `images` names the set's pictures, and what looks nearly as one of them (`max_distance` bits of
    64, see near_duplicates) goes. By meaning, in curate: `embeddings` names their embeddings by the same CLIP, and what
    has a cosine of `min_cosine` with one of them goes. A picture that cannot be decoded stays, for embed to tell.
    """

    images: str | None = field(default=None, metadata=NOT_IN_KEY)
    """A folder of pictures (with those below it), or a text file with a path a line, from where that file lies."""
    max_distance: int = 4
    """With images: bits of 64 that may differ."""
    embeddings: str | None = field(default=None, metadata=NOT_IN_KEY)
    """A .npy file, float [rows, width]."""
    min_cosine: float = 0.95
    """With embeddings: the cosine from which on two pictures are the same."""
    rule: Literal["contamination"] = "contamination"
    bounds: ClassVar[Mapping[str, Range]] = {"max_distance": Range(0, MOST), "min_cosine": COSINE}

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.images is None) == (self.embeddings is None):
            raise Refused("rule contamination: give either images (in filter) or embeddings (in curate)")

    @property
    def columns(self) -> tuple[str, ...]:
        """The hash, or the embedding."""
        return (EMBEDDING,) if self.images is None else (PHASH,)

    def opened(self) -> Contamination:
        """With the digest of the set, and its embeddings if it is given by those."""
        if self.images is None:
            assert self.embeddings is not None
            rule: Contamination = self._read(self.embeddings)
            _ = rule._known  # refused here, before anything is started
            return rule
        found = digest_of_files(pictures_of(self.images))
        return replace(self, sha256=check_pinned(self.sha256, found, self.images))

    def features(self, rows: pa.Table) -> pa.Table:
        if self.images is not None:
            return pa.table({"phash": rows[PHASH]})
        z = unit_embeddings(rows)
        if z.shape[1] != self._known.shape[1]:
            raise Refused(
                f"rule contamination: {self.embeddings} has embeddings of width {self._known.shape[1]}, and CLIP's has "
                f"{z.shape[1]}; make them with this CLIP"
            )
        best = [(z[at : at + _ROWS] @ self._known.T).max(1) for at in range(0, len(z), _ROWS)]
        return pa.table({"cosine": pa.array(np.concatenate(best) if best else [], pa.float32())})

    def reject(self, looks: Iterable[pa.Table]) -> Iterator[np.ndarray]:
        if self.images is None:
            for look in looks:
                yield numbers(look, "cosine") >= self.min_cosine
            return
        yield from split(near, map(hashes, looks), self._hashes(), self.max_distance)

    def _hashes(self) -> np.ndarray:
        """uint64 [rows]: the hashes of the set's pictures, read where the recipe is."""
        assert self.images is not None
        paths = pictures_of(self.images)
        if self.sha256 and digest_of_files(paths) != self.sha256:
            raise Refused(f"rule contamination: {self.images} changed while the run was under way; run again")
        found = []
        for path in paths:
            data = path.read_bytes()
            image = picture(io.BytesIO(data), 0, len(data))
            if image is None:
                raise Refused(f"rule contamination: {path} is no picture that can be decoded; leave it out")
            found.append(phash(image))
        return np.array(found, np.uint64)

    @cached_property
    def _known(self) -> np.ndarray:
        """float32 [rows, width], of length 1."""
        try:
            raw: Any = np.load(io.BytesIO(self.content), allow_pickle=False)
            raw = np.asarray(raw, np.float32)
        except (ValueError, TypeError, EOFError, AttributeError) as error:
            raise Refused(f"{self.embeddings} is no .npy file of numbers ({error})") from None
        if raw.ndim != 2 or not raw.size or not np.isfinite(raw).all():
            raise Refused(f"{self.embeddings} has shape {list(raw.shape)}; it must be [rows, width], of finite numbers")
        length = np.linalg.norm(raw, axis=1, keepdims=True)
        if not length.all():
            raise Refused(f"{self.embeddings}: row {int(np.argmin(length))} is 0, and is near to nothing; leave it out")
        return raw / length


def pictures_of(images: str) -> list[Path]:
    """The pictures of a folder, or those that a text file names; Refused where there is none, or one is missing."""
    place = Path(images)
    try:
        if place.is_dir():
            paths = [path for path in sorted(place.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]
        else:
            lines = place.read_text(encoding="utf-8").splitlines()
            paths = [place.parent / line.strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{images} cannot be read as a folder or a list of pictures: {error}") from None
    if missing := [path for path in paths if not path.is_file()]:
        raise Refused(f"{images} names {missing[0]}, which is not there")
    if not paths:
        raise Refused(f"{images} has no picture ({', '.join(sorted(SUFFIXES))})")
    return paths
