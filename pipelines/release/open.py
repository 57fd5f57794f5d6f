"""How a release of a store is found and opened: by what a person calls it, as a folder that unclip loads."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from pathlib import Path

from infra.documents import digest
from infra.errors import Refused
from infra.ledger import Ledger
from infra.records import Manifest, materialise
from infra.store import Store

CHAMPION = "champion"


def open_release(store: Store, ref: str) -> Path:
    """The folder of a release, whole and checked by whoever loads it: `unclip.UnCLIP.load(open_release(store, ref))`.

    ref: champion, NAME@champion, a version or its first digits, or a folder that holds a release. The folder made for a
    version lies in the user's cache and consists of links to the store's objects.
    """
    with contextlib.suppress(OSError, ValueError):  # no path can be as long as `ref`, or holds what it holds
        if (Path(ref) / "release.json").is_file():
            return Path(ref)
    version = find_release(store, ref)
    record = Manifest.load(store, version, "bundle").only
    folder = release_cache() / digest(store.uri.encode())[:16] / version[:32]
    if not all((folder / name).exists() for name in record.files):
        fresh = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}")
        materialise(store, record, fresh, verify=False)
        try:
            fresh.rename(folder)
        except OSError:  # another was faster, or an old one lost its objects
            if all((folder / name).exists() for name in record.files):
                shutil.rmtree(fresh)
            else:
                shutil.rmtree(folder)
                fresh.rename(folder)
    return folder


def find_release(store: Store, ref: str) -> str:
    """The version that `ref` names; Refused where there is none, or several."""
    name, at, word = ref.rpartition("@")
    if word == CHAMPION:
        line = name if at else only_line(store)
        head = Ledger(store, line).head()
        if head is None:
            raise Refused(
                f"the model line {line!r} has no champion yet in the store {store.uri}. "
                f"Make one: unclip run RECIPE --store {store.uri}"
            )
        return head.release
    if not re.fullmatch(r"[0-9a-f]{4,64}", ref):
        raise Refused(
            f"{ref!r} names no release: give {CHAMPION}, NAME@{CHAMPION}, a version's first digits (at least 4), or a "
            "folder that holds a release.json"
        )
    found = sorted({version for version in bundles(store) if version.startswith(ref)})
    if len(found) != 1:
        known = ", ".join(sorted(version[:12] for version in bundles(store))) or "none"
        trouble = f"{len(found)} releases begin" if found else "no release begins"
        raise Refused(f"{trouble} with {ref} in the store {store.uri}; its releases: {known}")
    return found[0]


def bundles(store: Store) -> list[str]:
    """Versions of every release in the store, the oldest first, promoted or not."""
    heads = [e for e in store.list("manifests/bundle-")]
    heads.sort(key=lambda entry: (entry.modified, entry.name))
    return list(dict.fromkeys(entry.name.rsplit("/", 1)[1].split(".")[0] for entry in heads))


def only_line(store: Store) -> str:
    """The line that is meant by none: unclip, or the only one that there is; Refused where there are several."""
    lines = Ledger.names(store)
    if "unclip" in lines or not lines:
        return "unclip"
    if len(lines) > 1:
        raise Refused(
            f"the store {store.uri} has several model lines; say which (NAME@{CHAMPION}, or --name NAME): "
            f"{', '.join(lines)}"
        )
    return lines[0]


def release_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unclip" / "releases"
