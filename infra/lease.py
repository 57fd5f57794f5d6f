"""Leases: of several drivers on one store, one does a piece of work.

All is made of `put_new` and the store's own clock. Under `leases/<key>/` lie
    <number>.json             who holds it; the first to put the next number has it
    <number>.beat-<n>.json    the holder's renewals; the newest is kept
    <number>.end.json         released
    clock-<nonce>             put to learn what time it is in the store, and deleted
A lease is void once released, once `ttl_s` have passed since its last sign of life, or at once if its holder ran on
this very host and is dead. A holder that was only slow learns from `renew` that it has lost; so that nothing it still
writes does harm, a lease's number goes into what its holder commits.
"""

from __future__ import annotations

import logging
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from time import monotonic

from infra.documents import SCHEMA_VERSION, canonical
from infra.errors import Refused
from infra.process import Process
from infra.records import document
from infra.store import Store

TTL_S = 60.0


@dataclass
class Lease:
    """A lease that is held; `acquire` gives it."""

    store: Store
    key: str
    number: int
    ttl_s: float
    beats: int = 0
    """Renewals so far."""

    @classmethod
    def acquire(cls, store: Store, key: str, ttl_s: float = TTL_S) -> Lease | None:
        """The lease of that key, or None while another holds it."""
        number, standing = _newest(store, key)
        if standing:
            return None
        lease = cls(store, key, number + 1, ttl_s)
        document = {
            "schema_version": SCHEMA_VERSION,
            "ttl_s": ttl_s,
            "holder": asdict(Process.this()),
            "nonce": uuid.uuid4().hex,
        }
        return lease if store.put_new(lease._name(), canonical(document)) else None

    def renew(self) -> bool:
        """A sign of life; False if the lease is lost to another. Call it several times within `ttl_s`."""
        self.beats += 1
        self.store.put_new(self._name(f".beat-{self.beats:06d}"), canonical({"nonce": uuid.uuid4().hex}))
        if self.beats > 1:
            self.store.delete(self._name(f".beat-{self.beats - 1:06d}"))
        return not self.store.exists(f"leases/{self.key}/{self.number + 1:08d}.json")

    def release(self) -> None:
        """Gives it up. Another can have it at once."""
        self.store.put_new(self._name(".end"), canonical({"schema_version": SCHEMA_VERSION}))

    @contextmanager
    def kept(self) -> Iterator[threading.Event]:
        """Renews in the background until the context ends, and releases then.

        The event is set once the lease is lost: to another, or because the store could not be reached for `ttl_s`.
        """
        done, lost = threading.Event(), threading.Event()

        def keep() -> None:
            alive = monotonic()
            while not done.wait(self.ttl_s / 4):
                try:
                    if not self.renew():
                        lost.set()
                        return
                    alive = monotonic()
                except (Refused, OSError) as error:
                    logging.getLogger(__name__).warning("lease %s could not be renewed: %s", self.key[:12], error)
                    if monotonic() - alive > self.ttl_s:
                        lost.set()
                        return

        thread = threading.Thread(target=keep, name=f"lease {self.key[:12]}", daemon=True)
        thread.start()
        try:
            yield lost
        finally:
            done.set()
            thread.join()
            self.release()

    def _name(self, suffix: str = "") -> str:
        return f"leases/{self.key}/{self.number:08d}{suffix}.json"


def alive(store: Store, since: datetime) -> dict[str, datetime]:
    """Keys of the leases that are neither released nor without a sign of life since then → when each was taken.

    From one listing, and on the safe side: it names some whose holder is dead.
    """
    taken: dict[tuple[str, int], datetime] = {}
    last: dict[tuple[str, int], datetime] = {}
    ended: set[tuple[str, int]] = set()
    for entry in store.list("leases/"):
        found = re.fullmatch(r"leases/([^/]+)/(\d{8})(?:\.(end)|\.beat-\d+)?\.json", entry.name)
        if found:
            lease = found[1], int(found[2])
            taken[lease] = min(taken.get(lease, entry.modified), entry.modified)
            last[lease] = max(last.get(lease, entry.modified), entry.modified)
            if found[3]:
                ended.add(lease)
    going_on = (lease for lease in sorted(taken) if lease not in ended and last[lease] > since)
    return {key: taken[key, number] for key, number in going_on}


def is_held(store: Store, key: str) -> bool:
    """Whether somebody holds the lease of that key."""
    return _newest(store, key)[1]


def _newest(store: Store, key: str) -> tuple[int, bool]:
    """The newest number (0: none yet), and whether its lease still stands."""
    signs: dict[int, datetime] = {}
    ended: set[int] = set()
    for entry in store.list(f"leases/{key}/"):
        found = re.fullmatch(r"(\d{8})(?:\.(end)|\.beat-\d+)?\.json", entry.name.rpartition("/")[2])
        if not found:
            continue
        number = int(found[1])
        signs[number] = max(signs.get(number, entry.modified), entry.modified)
        if found[2]:
            ended.add(number)
    if not signs:
        return 0, False
    number = max(signs)
    if number in ended:
        return number, False
    name = f"leases/{key}/{number:08d}.json"
    holder = document(store, name)
    if Process(**holder["holder"]).dead():
        return number, False
    return number, clock(store, key) - signs[number] <= timedelta(seconds=holder["ttl_s"])


def clock(store: Store, key: str) -> datetime:
    """The time by the store's clock, which is the one that dates leases."""
    probe = f"leases/{key}/clock-{uuid.uuid4().hex}"
    store.put_new(probe, b"")
    (entry,) = store.list(probe)
    store.delete(probe)
    return entry.modified
