"""The stages that the rows of a data set pass through, in their order: the one list, from which all others follow."""

from __future__ import annotations

from typing import Any

from pipelines.download import Download
from pipelines.embed import Embed, Statistics
from pipelines.fit.clip import LoadClip
from pipelines.select import FeatureStage, Select
from pipelines.source import Source

_STAGES: tuple[Any, ...] = (
    Source,
    Download,
    FeatureStage("filter"),
    Select("filter"),
    Embed,
    FeatureStage("curate"),
    Select("curate"),
)
DATA: tuple[str, ...] = tuple(stage.name for stage in _STAGES)
"""All of them, by name."""
STEPS: dict[str, str] = {stage.name: stage.step for stage in _STAGES if stage.step}
"""Those that each row passes one by one → what reports call the rows that they pass on."""
CHAIN = tuple(STEPS)
ROLES: dict[str, str] = {stage.name: stage.role for stage in (*_STAGES, Statistics, LoadClip) if stage.role}
"""What their manifests, and CLIP's, are to a trainer."""
