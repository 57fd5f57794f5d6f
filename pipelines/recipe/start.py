"""Which version of which release a recipe's `start` means."""

from __future__ import annotations

from infra.errors import Refused
from infra.store import Store
from pipelines.recipe.kinds import asked
from pipelines.recipe.schema import Recipe
from pipelines.release import CHAMPION, find_release


def resolve_starts(recipe: Recipe, store: Store) -> dict[str, str]:
    """What the recipe's sections call their `start` → the version of that release.

    Raises Refused for a champion, which the run itself may replace: run again, it would train all anew.
    """
    named = {one.section.start for one in asked(recipe) if one.section.start is not None}
    found = {}
    for ref in sorted(named):
        version = find_release(store, ref)
        if ref == CHAMPION or ref.endswith(f"@{CHAMPION}"):
            raise Refused(
                f"start is {ref}, which this run may replace, so that the next one would train anew. Name the release "
                f"that it means now: start: {version[:12]}"
            )
        found[ref] = version
    return found
