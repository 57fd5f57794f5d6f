"""Sections of a recipe, made of the dataclasses of the stages that they configure, so that nothing is written twice."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any, get_type_hints

DERIVED = {"low", "size", "embedding", "text_width", "context", "vocabulary", "inpaint"}
"""Fields of model configurations that follow from other numbers of the recipe, or from the section they stand in."""


def part(given: Any, cls: type) -> Any:
    """The fields of a section that belong to `cls`, as an instance of it."""
    return cls(
        **{item.name: getattr(given, item.name) for item in dataclasses.fields(cls) if hasattr(given, item.name)}
    )


def section(name: str, *parts: Any, drop: set[str] = frozenset(), partial: bool = False, **more: Any) -> Any:  # type: ignore[assignment]
    """A frozen dataclass of all fields of `parts` and `more`; `partial` makes each optional (None: not said).

    It refuses what its parts refuse, so that pydantic says where; a partial one waits for the preset it changes.
    """
    fields: list[Any] = []
    for each in parts:
        hints = get_type_hints(each)
        for item in dataclasses.fields(each):
            if item.name in drop:
                continue
            if partial:
                fields.append((item.name, hints[item.name] | None, field(default=None)))
            else:
                fields.append((item.name, hints[item.name], _default(item)))
    fields += [(key, hint, default) for key, (hint, default) in more.items()]
    fields.sort(
        key=lambda item: (
            item[2].default is not dataclasses.MISSING or item[2].default_factory is not dataclasses.MISSING
        )
    )

    def check(made: Any) -> None:
        for each in () if partial else parts:
            part(made, each)

    return dataclasses.make_dataclass(name, fields, frozen=True, namespace={"__post_init__": check})


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return field(default_factory=item.default_factory)
    if item.default is not dataclasses.MISSING:
        return field(default=item.default)
    return field()


def optional(hint: Any) -> tuple[Any, Any]:
    return hint | None, field(default=None)


def changes(config: type, *derived: str) -> Any:
    """What a recipe may change of a preset's model: every field that is not derived, none of them required."""
    return optional(section(f"{config.__name__} changes", config, drop=DERIVED | {*derived}, partial=True))


def said(section: Any) -> dict[str, Any]:
    """What a partial section says (fields that are not None)."""
    if section is None:
        return {}
    return {
        item.name: value for item in dataclasses.fields(section) if (value := getattr(section, item.name)) is not None
    }
