"""Samples that must not be in the data any more, and the objects that were removed for them.

    forgotten/salt                       32 random bytes, this store's own
    forgotten/samples/<digest>.json      what one request named, as digests; append-only, so none is ever taken back
    forgotten/objects/<sha256>           an object that held such a sample: it is removed, and not merely missing

A URL is never written down: only its HMAC under the store's salt, since addresses can be guessed and looked up in a
table of digests. uids and SHA-256s of pictures are digests already, and the index of a shard shows them anyway.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.documents import SCHEMA_VERSION, canonical, digest
from infra.records.objects import document
from infra.store import Store

FORGOTTEN = "forgotten"
"""The state of a row that is in the list below: nothing is left of it but its uid."""
SALT = "forgotten/salt"
SAMPLES = "forgotten/samples/"
OBJECTS = "forgotten/objects/"
_MOST = 100_000


@dataclass(frozen=True)
class ForgottenNames:
    """Samples named by a person: uids (16 bytes), URLs as in the list, and SHA-256s (32 bytes) of what was fetched."""

    uids: frozenset[bytes] = frozenset()
    urls: frozenset[str] = frozenset()
    pictures: frozenset[bytes] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.uids or self.urls or self.pictures)


@dataclass(frozen=True)
class Forgotten:
    """The list as it is now: digests of what was named, in no order."""

    salt: bytes = b""
    uids: frozenset[bytes] = frozenset()
    urls: frozenset[bytes] = frozenset()
    pictures: frozenset[bytes] = frozenset()
    requests: tuple[str, ...] = field(default=(), compare=False)
    """Names of the requests that it was read from."""

    @classmethod
    def load(cls, store: Store) -> Forgotten:
        """The list of a store: one listing, and nothing more as long as it does not grow."""
        names = tuple(entry.name for entry in store.list(SAMPLES))
        if not names:
            return cls()
        known = _loaded.get(store.uri)
        if known is None or known.requests != names:
            read = cls(store.get(SALT), requests=names)
            for name in names:
                read = read.plus(_read(store, name))
            _loaded[store.uri] = known = read
        return known

    @classmethod
    def of(cls, names: ForgottenNames, salt: bytes) -> Forgotten:
        """What a person named, as it would stand in the list."""
        return cls(salt, names.uids, frozenset(_secret(salt, url) for url in names.urls), names.pictures)

    def plus(self, other: Forgotten) -> Forgotten:
        """Both lists as one."""
        uids, urls, pictures = self.uids | other.uids, self.urls | other.urls, self.pictures | other.pictures
        return Forgotten(self.salt or other.salt, uids, urls, pictures, self.requests)

    def meets(self, other: Forgotten) -> bool:
        """Whether the two lists have a name in common."""
        return bool(self.uids & other.uids or self.urls & other.urls or self.pictures & other.pictures)

    def __bool__(self) -> bool:
        return bool(self.uids or self.urls or self.pictures)

    def among(self, table: pa.Table) -> np.ndarray:
        """Which rows are in the list, by uid, url and sha256 as far as the table has these columns: bool [rows]."""
        found = np.zeros(table.num_rows, bool)
        for column, names in (("uid", self.uids), ("sha256", self.pictures)):
            if names and column in table.column_names:
                values = pa.array(list(names), table.schema.field(column).type)
                found |= pc.is_in(table[column], value_set=values).to_numpy(zero_copy_only=False).astype(bool)
        if self.urls and "url" in table.column_names:
            urls = (url is not None and _secret(self.salt, url) in self.urls for url in table["url"].to_pylist())
            found |= np.fromiter(urls, bool, table.num_rows)
        return found


_loaded: dict[str, Forgotten] = {}


def url_salt(store: Store) -> bytes:
    """The store's salt, made if there is none yet."""
    if not store.exists(SALT):
        store.put_new(SALT, os.urandom(32))
    return store.get(SALT)


def add_request(store: Store, more: Forgotten) -> None:
    """Puts names into the store's list. The same names twice are one request."""
    lines = [("uid", name) for name in more.uids]
    lines += [("url", name) for name in more.urls] + [("sha256", name) for name in more.pictures]
    lines.sort()
    for first in range(0, len(lines), _MOST):
        said: dict[str, list[str]] = {"uid": [], "url": [], "sha256": []}
        for kind, name in lines[first : first + _MOST]:
            said[kind].append(name.hex())
        data = canonical({"schema_version": SCHEMA_VERSION, **said})
        store.put_new(f"{SAMPLES}{digest(data)}.json", data)


def read_requests(store: Store) -> Iterator[Forgotten]:
    """Each request of the list by itself."""
    for entry in store.list(SAMPLES):
        yield _read(store, entry.name)


def mark_removed(store: Store, objects: Iterable[str]) -> None:
    """Notes that objects held forgotten samples. It comes before their removal, so that none is ever merely missing."""
    for sha256 in objects:
        store.put_new(f"{OBJECTS}{sha256}", canonical({"schema_version": SCHEMA_VERSION}))


def removed_objects(store: Store) -> set[str]:
    """SHA-256s of objects that held forgotten samples."""
    return {entry.name.removeprefix(OBJECTS) for entry in store.list(OBJECTS)}


def blank_rows(index: pa.Table, gone: np.ndarray) -> pa.Table:
    """An index in which those rows (bool [rows]) are FORGOTTEN, and null but for their uid."""
    mask = pa.array(gone)
    columns = {}
    for name in index.column_names:
        kind = index.schema.field(name).type
        instead = pa.scalar(FORGOTTEN if name == "state" else None, kind)
        columns[name] = index[name] if name == "uid" else pc.if_else(mask, instead, index[name])
    return pa.table(columns, schema=index.schema)


def _secret(salt: bytes, url: str) -> bytes:
    return hmac.digest(salt, url.strip().encode(), "sha256")


def _read(store: Store, name: str) -> Forgotten:
    said = document(store, name)
    uids, urls, pictures = (frozenset(map(bytes.fromhex, said[kind])) for kind in ("uid", "url", "sha256"))
    return Forgotten(b"", uids, urls, pictures)
