"""A recipe: YAML in, the stages of a run out.

It checks every key and number, derives what is written once elsewhere, and says where a recipe is wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from pipelines.recipe import schema, stages
    from pipelines.recipe.schema import Recipe, World
    from pipelines.recipe.start import resolve_starts
else:
    __getattr__ = exports(__name__)
