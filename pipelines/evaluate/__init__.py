"""How good a release is: prompts are drawn and judged, and scores and grids made of it.

In go a release and prompts; out come scores.json and picture grids. It judges one release, never a pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from pipelines.evaluate import grids, scores
    from pipelines.evaluate.prompts import read_prompts
    from pipelines.evaluate.scores import check_name
    from pipelines.evaluate.stage import Evaluate, EvaluateSample, EvaluateSpec
else:
    __getattr__ = exports(__name__)
