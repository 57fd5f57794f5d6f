"""Objects, which are named by the SHA-256 of their bytes, and JSON documents of other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.documents import check_schema, digest
from infra.errors import Refused
from infra.records.damage import damaged, explain_damage

if TYPE_CHECKING:
    from infra.store import Store


def document(store: Store, name: str) -> dict[str, Any]:
    """The JSON document of that name; Refused where it is missing, damaged, or of an unknown schema version."""
    with explain_damage(name):
        return check_schema(json.loads(store.get(name)), name)


def object_name(sha256: str) -> str:
    """Where the object of that SHA-256 lies."""
    return f"objects/{sha256[:2]}/{sha256}"


def read_object(store: Store, sha256: str) -> bytes:
    """The bytes of that SHA-256, for what is small; Refused, code 5, where they are missing or others."""
    name = object_name(sha256)
    with explain_damage(name):
        data = store.get(name)
    if digest(data) != sha256:
        raise damaged(name, "is damaged: its SHA-256 is another")
    return data


def put_object(store: Store, sha256: str, data: bytes | Path) -> None:
    """Puts the bytes of that SHA-256; raises Refused, code 5, if others lie under its name, which are damaged."""
    if not store.put_new(object_name(sha256), data):
        raise Refused(f"{object_name(sha256)} in store {store.uri} is damaged: delete it and run again", code=5)
