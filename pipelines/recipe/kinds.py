"""The kinds of model that a recipe can train: the section that asks for one, what it needs, and its stage's name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from training.options import KINDS as TRAINED

ROWS = ("embed", "curate")
"""Stages that a fit reads rows through; their order is in keys."""
CLIP_ROWS = (*ROWS, "statistics", "clip")


@dataclass(frozen=True)
class Kind:
    """How a recipe asks for one kind of model."""

    section: str
    """The recipe's section."""
    needs: tuple[str, ...]
    """Stages whose data it is trained on; those that it goes on from come behind them."""
    model: str = ""
    """Named "module:function": one that takes (`models.Known`, the models so far) and returns stage → configuration."""
    stage: str = ""
    """Its stage's name, the section's without it; with "{}" in it the section is a mapping, and its keys go there."""


KINDS: dict[str, Kind] = {
    "clip": Kind("clip", ("download", "filter")),
    "decoder": Kind("decoder", CLIP_ROWS, "pipelines.recipe.models:decoder"),
    "prior": Kind("prior", CLIP_ROWS, "pipelines.recipe.models:prior"),
    "ar_prior": Kind("ar_prior", CLIP_ROWS, "pipelines.recipe.models:ar_prior", stage="prior"),
    "upsampler": Kind("upsamplers", CLIP_ROWS, "pipelines.recipe.models:upsamplers", stage="upsampler-{}"),
    "inpainter": Kind("inpainter", CLIP_ROWS, "pipelines.recipe.models:inpainter"),
    "classifier": Kind("classifier", ROWS, "pipelines.recipe.models:classifier"),
    "noised_clip": Kind("noised_clip", (*ROWS, "clip"), "pipelines.recipe.models:noised_clip", stage="noised-clip"),
}
"""In the order of a run's fits, which is in the key of a release. `training.options.KINDS` and
`unclip.release.model.KINDS` have a row for each too."""


@dataclass(frozen=True)
class Asked:
    """One model that a recipe asks for."""

    kind: str
    stage: str
    path: str
    """Where the recipe says so: "decoder", "upsamplers.64"."""
    section: Any

    @property
    def needs(self) -> tuple[str, ...]:
        """Stages that its fit needs: without a `start`, also those that it goes on from."""
        needs = KINDS[self.kind].needs
        return needs if self.section.start else (*needs, *TRAINED[self.kind].from_kinds)


def asked(recipe: Any) -> Iterator[Asked]:
    """The models that a recipe asks for, in the order of `KINDS`."""
    for kind, row in KINDS.items():
        section = recipe.section(row.section)
        if section is None:
            continue
        if "{}" in row.stage:
            for key in sorted(section):
                yield Asked(kind, row.stage.format(key), f"{row.section}.{key}", section[key])
        else:
            yield Asked(kind, row.stage or row.section, row.section, section)
