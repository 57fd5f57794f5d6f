"""The upkeep of data: list, verify, compare, collect garbage, forget.

In go versions; out come accounts of every row, or a store without what nothing refers to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from pipelines.versions import diff, forget, gc, show, verify
    from pipelines.versions.forget import Account
    from pipelines.versions.gc import run_lease
else:
    __getattr__ = exports(__name__)
