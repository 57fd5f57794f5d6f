"""Sections and the dataclasses they are made of: what belongs to which, and sections of which nothing is required."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import field
from typing import Any, TypeVar, get_type_hints

DERIVED = {"low", "size", "embedding", "text_width", "context", "vocabulary", "inpaint"}
"""Fields of model configurations that follow from other numbers of the recipe, or from the section they stand in."""

Part = TypeVar("Part")


def part(given: Any, cls: type[Part]) -> Part:
    """The fields of a section that belong to `cls`, as an instance of it. Raises Refused for what `cls` refuses."""
    names = [item.name for item in dataclasses.fields(cls) if hasattr(given, item.name)]  # type: ignore[arg-type]
    return cls(**{name: getattr(given, name) for name in names})


def partial(config: type, drop: Collection[str] = ()) -> Any:
    """A frozen dataclass of all fields of a configuration but those to drop, each of which may be left out (None).

    It refuses nothing itself: what it says waits for the preset that it changes.
    """
    hints = get_type_hints(config)
    names = [item.name for item in dataclasses.fields(config) if item.name not in drop]
    fields = [(name, hints[name] | None, field(default=None)) for name in names]
    return dataclasses.make_dataclass(f"{config.__name__} changes", fields, frozen=True)


def said(section: Any) -> dict[str, Any]:
    """What a partial section says (fields that are not None)."""
    if section is None:
        return {}
    return {
        item.name: value for item in dataclasses.fields(section) if (value := getattr(section, item.name)) is not None
    }
