"""Which rows stay: rules look at each shard and decide over all of them.

In go shards; out comes a selection that names, for each row that goes, the rule that took it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from pipelines.select.stage import FEATURES, ROW_SOURCES, FeatureStage, Select, read_selection
else:
    __getattr__ = exports(__name__)
