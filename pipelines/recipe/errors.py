"""What pydantic found wrong with a recipe, in one paragraph: where, what, and what is meant most likely."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

MOST = 5
"""Mistakes that are told one by one."""
_CHOICE = re.compile(r"\[key\]$|int$|tuple\[")
"""What pydantic puts into a path beside the keys: that a key is wrong, and which of several types was tried."""


def explain(errors: Sequence[Mapping[str, Any]], root: type, where: str) -> str:
    """One paragraph with the path of each thing that is wrong, and the nearest known key for an unknown one.

    errors: pydantic's, each with loc, type, msg and input. root: the dataclass that was validated. where: what the
    person calls the recipe.
    """
    lines: list[str] = []
    for item in errors[:MOST]:
        steps = [str(step) for step in item["loc"] if not _CHOICE.match(str(step))]
        path = _dotted(steps)
        if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = _keys(root, steps[:-1])
            near = difflib.get_close_matches(steps[-1], known, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            lines.append(f"{path} is no known key; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{path} is missing")
        elif item["type"] == "union_tag_not_found":
            lines.append(f"{path}.rule is missing: it says which rule it is")
        elif item["type"] == "union_tag_invalid":
            tag, known = item["ctx"]["tag"], re.findall(r"'(\w+)'", item["ctx"]["expected_tags"])
            near = difflib.get_close_matches(tag, known, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"its rules: {', '.join(known)}"
            lines.append(f"{path}.rule is {tag!r}, which unclip does not have; {hint}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            value = json.dumps(item["input"], default=str)
            shown = f" (got {value})" if len(value) < 60 and item["type"] != "value_error" else ""
            lines.append(_at(root, steps, message) + shown)
    more = f" … and {len(errors) - MOST} more" if len(errors) > MOST else ""
    text = f"Recipe {where}: " + "; ".join(lines) + more
    return text if text.endswith((".", "?")) else f"{text}."


def _at(root: type, steps: list[str], message: str) -> str:
    """A refusal with the dotted path where it arose; what the message itself says of the path is not said twice."""
    for first in range(len(steps)):
        said = ".".join(steps[first:])
        if message.startswith((f"{said}.", f"{said} ", f"{said}:")):
            return ".".join([*filter(None, [_dotted(steps[:first])]), message])
    if re.split(r"[ .]", message, maxsplit=1)[0] in {*_keys(root, steps)} - {"rule"}:  # "rule size: …" says which rule
        return f"{_dotted(steps)}.{message}"
    return f"{_dotted(steps)}: {message}" if steps else message


def _dotted(steps: list[str]) -> str:
    """The path as a person would write it: without the name of the rule that pydantic puts behind a rule's number."""
    return ".".join(step for place, step in enumerate(steps) if place < 2 or steps[place - 2] != "rules")


def _keys(root: type, steps: list[str]) -> list[str]:
    """The known keys at a path."""
    hint: Any = root
    for step in steps:
        hint = _strip(hint)
        if dataclasses.is_dataclass(hint):
            hint = get_type_hints(hint, include_extras=True).get(step, dict)
        elif get_origin(hint) in (tuple, dict):
            hint = get_args(hint)[1 if get_origin(hint) is dict else 0]
    hint = _strip(hint)
    if get_origin(hint) in (Union, types.UnionType):
        hint = next((choice for choice in get_args(hint) if steps and _tag(choice) == steps[-1]), hint)
    return [item.name for item in dataclasses.fields(hint) if item.init] if dataclasses.is_dataclass(hint) else []


def _strip(hint: Any) -> Any:
    """The hint without None and Annotated; what a mark of `Annotated` calls its `choices` in place of it."""
    if get_origin(hint) is Annotated:
        plain, *marks = get_args(hint)
        hint = next((mark.choices for mark in marks if hasattr(mark, "choices")), plain)
    choices = [choice for choice in get_args(hint) if choice is not type(None)]
    return _strip(choices[0]) if get_origin(hint) in (Union, types.UnionType) and len(choices) == 1 else hint


def _tag(cls: Any) -> str:
    hint = get_type_hints(cls).get("rule") if dataclasses.is_dataclass(cls) else None
    return get_args(hint)[0] if get_origin(hint) is Literal else ""
