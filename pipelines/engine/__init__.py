"""What runs stages: the graph of what is to do, its execution on Ray, and what is told of it.

In go stages and a store; out come records. It knows no stage by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from pipelines.engine import plan
    from pipelines.engine.console import Console
    from pipelines.engine.execute import Execution
    from pipelines.engine.graph import chosen, differences
    from pipelines.engine.tracking import source_tag
    from pipelines.engine.versions import Version, find_version, list_versions, reconcile
else:
    __getattr__ = exports(__name__)
