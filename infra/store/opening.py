"""Which store a URI means: a folder, or S3."""

from __future__ import annotations

from pathlib import Path

from infra.errors import Refused
from infra.store.base import Store
from infra.store.local import LocalStore


def open_store(uri: str, *, create: bool = True, cache: Path | None = None, endpoint: str | None = None) -> Store:
    """The store at a folder's path, or at `s3://bucket/prefix`.

    A folder is made if it does not exist, unless create is False: then it is not touched, and lists nothing.
    cache (S3 only): the folder of local copies, default `$XDG_CACHE_HOME/unclip`. endpoint (S3 only): the URL of an S3
    server other than Amazon's, default `$AWS_ENDPOINT_URL`. Refused if it cannot be read, or (create) not be written.
    """
    if uri.startswith("s3://"):
        from infra.store.s3 import S3Store

        return S3Store.open(uri, create=create, cache=cache, endpoint=endpoint)
    scheme, separator, path = uri.partition("://")
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
