"""A recipe's YAML as a plain document: read with care, since whoever wrote it may have slipped; changed by --set."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from infra.errors import Refused

MOST_BYTES = 1 << 20
"""Of a recipe's file; the longest that comes with unclip has 4,000."""
MOST_VALUES = 10_000
"""Of a recipe once aliases are written out: ten lines of YAML can stand for more values than there is memory."""
DEEPEST = 32
"""Levels of mappings and lists within each other; recipes have six."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that also reads 2e-4 as a number, as everybody means it (YAML 1.1 wants 2.0e-4), and that
    refuses a key which stands twice in a mapping: YAML's own would let the last one win in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    problem = f"the key {key.value!r} is in line {lines[key.value]} already; keep one of them"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                lines[key.value] = key.start_mark.line + 1
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; raises Refused, with the line where there is one, for anything else."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise Refused(f"{path} has more than {MOST_BYTES:,} bytes; that is no recipe")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is not valid YAML: it is no text in UTF-8 (byte {error.start:,})") from None
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror or error}") from None
    document = _parsed(text, f"{path} is not valid YAML")
    if document is None:
        raise Refused(f"{path} is empty; see the recipes that come with unclip for the form")
    if not isinstance(document, dict):
        raise Refused(f"{path} holds no mapping of sections; see the recipes that come with unclip for the form")
    return document


def change(document: dict[str, Any], setting: str) -> None:
    """Applies one `--set dotted.key=value` (the value in YAML) in place."""
    path, equals, text = setting.partition("=")
    if not equals or not path.strip():
        raise Refused(f"--set {setting!r}: write it as key=value, for instance --set prior.train.steps=500")
    value = _parsed(text, f"--set {setting!r}: {text!r} is no YAML value")
    *parents, last = [int(step) if step.isdecimal() else step for step in path.strip().split(".")]
    place: Any = document
    nowhere = Refused(f"--set {setting!r}: {path.strip()!r} leads nowhere in this recipe")
    for step in parents:
        if isinstance(place, dict):
            if place.get(step) is None:
                place[step] = {}
            place = place[step]
        elif isinstance(place, list) and isinstance(step, int) and step < len(place):
            place = place[step]
        else:
            raise nowhere
    if isinstance(place, dict) or (isinstance(place, list) and isinstance(last, int) and last < len(place)):
        place[last] = value  # type: ignore[index]
    else:
        raise nowhere


def check(document: Any, where: str) -> None:
    """Raises Refused, with the dotted path, for what is no plain, finite document of moderate size."""
    left: list[tuple[Any, tuple[str, ...]]] = [(document, ())]
    seen = 0
    while left:
        value, path = left.pop()
        seen += 1
        if seen > MOST_VALUES:
            raise Refused(f"{where} has more than {MOST_VALUES:,} values (aliases count as what they stand for)")
        if len(path) > DEEPEST:
            raise Refused(f"{where}: {_dotted(path[:4])}… is nested more than {DEEPEST} levels deep")
        if isinstance(value, dict):
            names = [str(key) for key in value]
            if twice := {name for name in names if names.count(name) > 1}:
                raise Refused(f"{where}: {_dotted((*path, *sorted(twice)[:1]))} is there as a text and as a number")
            left += [(inner, (*path, str(key))) for key, inner in value.items()]
        elif isinstance(value, list):
            left += [(inner, (*path, str(number))) for number, inner in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            raise Refused(f"{where}: {_dotted(path)} is {value}; it must be a finite number")
        elif value is not None and not isinstance(value, (str, int, float)):
            kind = type(value).__name__
            raise Refused(f"{where}: {_dotted(path)} is a {kind}; write numbers, texts (in quotes), lists or mappings")


def _parsed(text: str, complaint: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise Refused(f"{complaint}: {at}{error.problem or error.context}") from None
    except RecursionError:
        raise Refused(f"{complaint}: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that there is not, an integer without end
        raise Refused(f"{complaint}: {' '.join(str(error).split())}") from None


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(path) or "the whole"
