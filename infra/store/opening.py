"""Which store a URI means: a folder, S3, or what a plug-in adds."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from infra.errors import Refused
from infra.store.base import Store
from infra.store.local import LocalStore


class Opener(Protocol):
    """Opens the stores of one scheme."""

    def __call__(self, uri: str, *, create: bool, cache: Path | None, endpoint: str | None) -> Store:
        """The store at a URI of that scheme: see `open_store`."""
        ...


def _open_s3(uri: str, *, create: bool, cache: Path | None, endpoint: str | None) -> Store:
    from infra.store.s3 import S3Store

    return S3Store.open(uri, create=create, cache=cache, endpoint=endpoint)


SCHEMES: dict[str, Opener] = {"s3": _open_s3}
"""What stands before `://` → what opens it. A folder has none, or `file`."""


def open_store(uri: str, *, create: bool = True, cache: Path | None = None, endpoint: str | None = None) -> Store:
    """The store at a folder's path, or at `s3://bucket/prefix`.

    A folder is made if it does not exist, unless create is False: then it is not touched, and lists nothing.
    cache (S3 only): the folder of local copies, default `$XDG_CACHE_HOME/unclip`. endpoint (S3 only): the URL of an S3
    server other than Amazon's, default `$AWS_ENDPOINT_URL`. Refused if it cannot be read, or (create) not be written.
    """
    scheme, separator, path = uri.partition("://")
    if separator and scheme in SCHEMES:
        return SCHEMES[scheme](uri, create=create, cache=cache, endpoint=endpoint)
    if separator and scheme != "file":
        raise Refused(f"store {uri!r}: unknown scheme {scheme!r}. Use a folder's path, or s3://bucket/prefix.")
    if not uri:
        raise Refused("the store's name is empty. Use a folder's path, or s3://bucket/prefix.")
    folder = Path(path if separator else uri).expanduser().absolute()
    try:
        folder.exists()
    except (OSError, ValueError) as error:  # longer than a path may be, or with a character that none may have
        raise Refused(f"store {uri[:100]!r} is no folder's path: {error.args[-1]}") from None
    store = LocalStore(folder)
    store.check(create)
    return store
