"""Which release is champion: the gate, the promotion, the ledger by hand, and MLflow's mirror of it.

In go scores; out come entries of the ledger, which is append-only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from pipelines.promote import ledger
    from pipelines.promote.gate import VERDICT, Gate, GateSpec
    from pipelines.promote.ledger import view_root
    from pipelines.promote.promote import PROMOTION, Promote
    from pipelines.promote.registry import tracking_uri
else:
    __getattr__ = exports(__name__)
