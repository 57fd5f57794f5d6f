"""The prompts of an evaluation: a JSON-lines file, checked line by line, cut into chunks that name themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from infra.documents import canonical, digest
from infra.errors import Refused


@dataclass(frozen=True)
class Prompt:
    """One line: what to draw, the group it is counted in, and what the judge expects to see (None: not judged)."""

    prompt: str
    kind: str = "all"
    expected: dict[str, Any] | None = None

    @property
    def document(self) -> dict[str, Any]:
        """The line as plain JSON."""
        return {"prompt": self.prompt, "kind": self.kind, "expected": self.expected}


@dataclass(frozen=True)
class Chunk:
    """Prompts [first, first + len) of the whole list; a prompt's seed comes from its number in the list."""

    first: int
    prompts: tuple[Prompt, ...]
    values: dict[str, dict[str, list[str]]]
    """Kind → attribute → every value that the whole list expects of it: the alternatives of a zero-shot choice."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides what this chunk is asked."""
        lines = [prompt.document for prompt in self.prompts]
        return digest(canonical({"first": self.first, "prompts": lines, "values": self.values}))


def read_prompts(path: Path | str) -> tuple[Prompt, ...]:
    """Reads a file with a line {"prompt": …, "kind": …, "expected": {…}} for each prompt; the last two may be missing.

    Raises Refused, with the line's number, for anything else, and for an empty file.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"the prompts {path} cannot be read: {error}") from None
    found = tuple(_prompt(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip())
    if not found:
        raise Refused(f"{path} holds no prompts: it needs a JSON object with a prompt on each line")
    return found


def chunks(prompts: Sequence[Prompt], size: int) -> Iterator[Chunk]:
    """The list, `size` prompts at a time. Added lines change no full chunk before them, unless they bring values."""
    values = expected_values(prompts)
    for first in range(0, len(prompts), size):
        part = tuple(prompts[first : first + size])
        kinds = {prompt.kind for prompt in part}
        yield Chunk(first, part, {kind: values[kind] for kind in sorted(kinds) if kind in values})


def expected_values(prompts: Sequence[Prompt]) -> dict[str, dict[str, list[str]]]:
    """Kind → attribute → values, sorted: those attributes of `expected` whose value is a plain text."""
    found: dict[str, dict[str, set[str]]] = {}
    for prompt in prompts:
        for name, value in (prompt.expected or {}).items():
            if isinstance(value, str):
                found.setdefault(prompt.kind, {}).setdefault(name, set()).add(value)
    return {
        kind: {name: sorted(values) for name, values in sorted(attributes.items()) if len(values) > 1}
        for kind, attributes in sorted(found.items())
    }


def alternatives(prompt: Prompt, values: dict[str, list[str]]) -> dict[str, list[str]]:
    """Attribute → the prompt with every value that the attribute may have, its own first.

    Only attributes whose value stands in the prompt exactly once: replacing it then says nothing else.
    """
    found = {}
    for name, choices in values.items():
        own = (prompt.expected or {}).get(name)
        if not isinstance(own, str):
            continue
        word = re.compile(rf"\b{re.escape(own)}\b")
        if len(word.findall(prompt.prompt)) == 1:
            before, after = word.split(prompt.prompt)
            found[name] = [prompt.prompt, *(f"{before}{value}{after}" for value in choices if value != own)]
    return found


def _prompt(line: str, where: str) -> Prompt:
    try:
        document = json.loads(line)
    except ValueError as error:
        raise Refused(f"{where} is no JSON: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("prompt"), str):
        raise Refused(f'{where} has no "prompt"; a line is {{"prompt": "a red circle", "kind": "single"}}')
    unknown = sorted(set(document) - {"prompt", "kind", "expected"})
    kind, expected = document.get("kind", "all"), document.get("expected")
    if unknown:
        raise Refused(f"{where} has {', '.join(unknown)}; a line has prompt, kind and expected, and nothing else")
    if not isinstance(kind, str) or not re.fullmatch(r"[a-z0-9-]+", kind):
        raise Refused(f"{where}: kind is {json.dumps(kind)}; write a word of lower-case letters, digits and hyphens")
    if expected is not None and not isinstance(expected, dict):
        raise Refused(f"{where}: expected must be a mapping that the judge understands")
    return Prompt(document["prompt"], kind, expected)
