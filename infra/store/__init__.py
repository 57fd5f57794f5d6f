"""Named bytes, each written once: in a folder, or in S3.

In go bytes or files and a name, and the first to put a name wins; out come the same bytes, whole or in part. Everything
that lasts lies in a store; no other room speaks to a disk or to S3 about it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from infra.store.base import Entry, Store
    from infra.store.opening import open_store
    from infra.store.retry import RetryingStore, with_retries
else:
    __getattr__ = exports(__name__)
