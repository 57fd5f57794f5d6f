"""JSON and tensors in folders that a stranger may have written: bounded regular files, and nothing of them is run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from unclip.errors import Refused

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
MOST_BYTES = 64 << 20
"""Larger ones are no configuration and no table of merges; the largest that is in use has a few megabytes."""


def read_text(path: Path) -> str:
    """A file's UTF-8 text; raises OSError unless it is a regular file (a pipe never ends), ValueError for its content.

    A link is followed: the folder of a stored release consists of links.
    """
    if path.exists() and not path.is_file():
        raise OSError("it is no regular file")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    return path.read_text(encoding="utf-8")


def read_document(path: Path) -> Any:
    """What a JSON file says; raises OSError and ValueError as `read_text` does."""
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a document with this schema's version, the same bytes for the same document."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **document}, indent=1, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Reads `write_json`'s document; raises Refused where it is missing, unreadable or of another schema version."""
    try:
        document = read_document(path)
    except FileNotFoundError:
        raise Refused(f"{path} does not exist, so {path.parent} holds no {what}") from None
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read as the JSON of a {what}: {error}") from None
    found = document.get("schema_version") if isinstance(document, dict) else None
    if found != SCHEMA_VERSION:
        raise Refused(
            f"{path} has schema version {found!r}, and this unclip reads version {SCHEMA_VERSION}. "
            "Use the unclip that wrote it, or make it anew."
        )
    return document


@contextmanager
def explain_document(path: Path, what: str) -> Iterator[None]:
    """Turns what a document of the right version and the wrong content leads to into Refused."""
    try:
        yield
    except Refused:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        # RuntimeError is what torch says of layers that no memory holds.
        raise Refused(
            f"{path} is no {what} that this unclip understands ({type(error).__name__}: {shorten(str(error), 300)})"
        ) from None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a state dict as safetensors, in the order of names, from the host."""
    from safetensors.torch import save_file

    save_file({name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file; raises Refused where it is missing, no such file, or holds NaN or infinity."""
    from safetensors.torch import load_file

    with explain_tensors(path):
        tensors = load_file(path)
    if bad := sorted(name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())):
        raise Refused(f"{path} holds numbers that are not finite, in {', '.join(bad[:5])}: its training diverged")
    return tensors


@contextmanager
def explain_tensors(path: Path) -> Iterator[None]:
    """Turns what a missing or damaged safetensors file leads to into Refused."""
    from safetensors import SafetensorError

    if path.exists() and not path.is_file():
        raise Refused(f"{path} is no regular file")
    try:
        yield
    except FileNotFoundError:
        raise Refused(f"{path} does not exist: the folder {path.parent} is incomplete") from None
    except (SafetensorError, OSError, MemoryError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        # The last five are torch's, for a header of impossible shapes.
        raise Refused(f"{path} is no readable safetensors file: {shorten(str(error), 300)}") from None


def shape_mismatch(found: Mapping[str, Sequence[int]], needed: Mapping[str, Sequence[int]]) -> str:
    """What of these shapes, by a tensor's name, is not as needed; "" where all is."""
    wrong = [f"{name} is missing" for name in sorted(needed.keys() - found.keys())]
    wrong += [f"there is no {name} in it" for name in sorted(found.keys() - needed.keys())]
    wrong += [
        f"{name} is {list(found[name])}, and {list(shape)} is needed"
        for name, shape in sorted(needed.items())
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    return "; ".join(wrong[:3]) + " …" * (len(wrong) > 3)
