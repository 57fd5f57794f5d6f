"""Settings that have another name now: the old one is accepted with a notice until 1.0."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from infra.errors import Refused

_FITS = ("clip", "prior", "ar_prior", "decoder", "inpainter", "upsamplers.*", "classifier", "noised_clip")
RENAMED = {
    "download.apart": "isolate",
    "download.again": "retry_pass",
    "download.again_states": "retry_states",
    **{f"{section}.patience_s": "store_wait_s" for section in _FITS},
}
"""Old path → new name beside it; "*" is any key. Only settings that are in no key."""


def rename(document: dict[str, Any], where: str) -> list[str]:
    """Puts what stands under an old name in a plain document under the new one; returns a notice for each.

    The mappings that it changes are copies. Raises Refused where both names are given.
    """
    notices = []
    for old, new in RENAMED.items():
        *parents, name = old.split(".")
        for path, section in _sections(document, parents):
            if name in section:
                path, target = ".".join([*path, name]), ".".join([*path, new])
                if new in section:
                    raise Refused(f"{where}: {path} is {target} now, and both are given; leave out {path}")
                section[new] = section.pop(name)
                notices.append(f"{path} is called {target} now; the old name works until 1.0")
    return notices


def _sections(document: dict[str, Any], parents: list[str], path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """(path, mapping) of the sections that a path names, each copied into its parent first."""
    if not parents:
        yield path, document
        return
    first, *rest = parents
    for key in list(document) if first == "*" else [first]:
        if isinstance(document.get(key), dict):
            document[key] = dict(document[key])
            yield from _sections(document[key], rest, (*path, str(key)))
