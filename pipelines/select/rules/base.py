"""What a rule is, and what all of them share: files that they read, and columns as numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa

from infra.documents import digest, digest_file
from infra.errors import Refused
from unclip.config import LATER, Range, outside

NOT_IN_KEY = {"how": True}
"""Metadata of a field that says where something lies, or holds its bytes: a digest beside it is in the key."""
PHASH, DEVIATION = "picture:phash", "picture:deviation"
"""Columns that no shard has: `features` is given them measured from the decoded picture (image.py)."""
EMBEDDING = "image_embedding"
COSINE = Range(-1, 1)


class Rule(Protocol):
    """One rule of a recipe; a frozen dataclass whose `rule` is its kind there.

    Rules are applied in the recipe's order, and each sees only the rows that those before it let stay.
    """

    rule: Any

    @property
    def label(self) -> str:
        """What the rows that it rejects are marked with, in every selection and account."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the data that `features` reads."""
        ...

    def features(self, rows: pa.Table) -> pa.Table:
        """A few bytes a row, from `columns` of one shard's kept rows, in their order."""
        ...

    def reject(self, looks: Iterable[pa.Table]) -> Iterator[np.ndarray]:
        """For each look, in manifest order, bool [rows]: which rows do not stay."""
        ...


@dataclass(frozen=True, kw_only=True)
class BaseRule:
    """What all rules have: the ranges of their numbers, and a name where a recipe has several of one kind."""

    bounds: ClassVar[Mapping[str, Range]] = {}
    """Field → the numbers that it may be."""
    name: str = field(default="", metadata=LATER)
    """Tells it from others of its kind: the rows that it rejects are marked `<kind>-<name>` instead of `<kind>`."""
    rule: Any = ""

    def __post_init__(self) -> None:
        if wrong := outside(self, **self.bounds):
            raise Refused(f"rule {self.rule}: {wrong}")
        if self.name and not re.fullmatch("[a-z0-9_]+", self.name):
            raise Refused(f"rule {self.rule}: name is {self.name!r}; write small letters, digits and _")

    @property
    def label(self) -> str:
        """What the rows that it rejects are marked with."""
        return f"{self.rule}-{self.name}" if self.name else str(self.rule)


def kind_of(label: str) -> str:
    """The kind of the rule that marked a row."""
    return label.partition("-")[0]


@dataclass(frozen=True, kw_only=True)
class FileRule(BaseRule):
    """What rules share that read a small file: it is read once, where the recipe is, and its bytes travel with the
    rule to whoever looks. The SHA-256 is in the key and the path is not, so a moved file changes nothing.
    """

    sha256: str = ""
    """SHA-256 of the file in hex; found out, and checked where the recipe says it."""
    content: bytes = field(default=b"", init=False, repr=False, compare=False, metadata=NOT_IN_KEY)

    def __getstate__(self) -> dict[str, Any]:
        """What travels: the fields, and not what was made of them here."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def _read(self, path: str) -> Any:
        """This rule with the file's bytes and their digest; Refused where the file cannot be read or is another."""
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise Refused(f"{path} cannot be read: {error.strerror or error}") from None
        opened = replace(self, sha256=check_pinned(self.sha256, digest(content), path))
        object.__setattr__(opened, "content", content)
        return opened


def check_pinned(wanted: str, found: str, path: str) -> str:
    """The digest that was found; Refused where the recipe pins another."""
    if wanted not in ("", found):
        raise Refused(f"sha256 is {wanted[:12]}…, and {path} has {found[:12]}…: it is another file")
    return found


def opened(rule: Rule) -> Rule:
    """The rule with what it needs from outside itself: digests in its key, and small files read into it.

    Raises Refused where a file cannot be read, is another than the recipe says, or is nothing the rule can use.
    """
    read = getattr(rule, "opened", None)
    return read() if read else rule


def digest_of_files(paths: Iterable[Path]) -> str:
    """One SHA-256 (hex) for a set of files, whatever they are called and in whichever order they come."""
    return digest("\n".join(sorted({digest_file(path) for path in paths})).encode())


def numbers(look: pa.Table, column: str) -> np.ndarray:
    """A column as numbers [rows]; null becomes NaN, which no comparison accepts and none rejects."""
    return look[column].combine_chunks().to_numpy(zero_copy_only=False)


def unit_embeddings(rows: pa.Table) -> np.ndarray:
    """CLIP's image embeddings as float32 [rows, width] of length 1 (0 where an embedding is 0)."""
    column = rows[EMBEDDING].combine_chunks()
    raw = np.asarray(column.flatten(), np.float32).reshape(-1, column.type.list_size)
    return raw / np.maximum(np.linalg.norm(raw, axis=1, keepdims=True), 1e-12)
