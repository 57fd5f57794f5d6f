"""The house as a whole: no circles, rooms that others enter by their door, files that one can read at a sitting."""

from __future__ import annotations

import ast
import graphlib
import importlib
import tokenize
from collections import defaultdict
from functools import cache
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("pipelines", "training", "unclip", "infra")
FILES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
ROOMS = sorted(path.parent for floor in FLOORS for path in (ROOT / floor).rglob("*/__init__.py"))
LINES = 300
"""Lines of code in a file, at most."""
MODULES = 14
"""Modules side by side, at most."""


def module(path: Path) -> str:
    """The dotted name of a file, or of a package's folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(name: str) -> str:
    """The innermost room that a module stands in, or is; "" for a loose one."""
    rooms = [module(one) for one in ROOMS]
    return max((one for one in rooms if f"{name}.".startswith(f"{one}.")), key=len, default="")


@cache
def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every `from … import …` of the project's own, wherever it stands in the file."""
    found = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom))
    return [
        (str(node.module), alias.name)
        for node in found
        for alias in node.names
        if str(node.module).split(".")[0] in FLOORS
    ]


def offered(package: Path) -> dict[str, str]:
    """What a room's `__init__.py` imports or sets: name → the module that it comes from."""
    body = ast.parse((package / "__init__.py").read_text()).body
    targets = [node.target for node in body if isinstance(node, ast.AnnAssign)]
    own = {target.id: module(package) for target in targets if isinstance(target, ast.Name)}
    return own | {name: home for home, name in imports(package / "__init__.py") if name != "exports"}


@cache
def wanted() -> dict[str, set[str]]:
    """A package → the names that other folders import from it."""
    found = defaultdict(set)
    for path in FILES:
        for home, name in imports(path):
            if path.parent != ROOT / Path(*home.split(".")):
                found[home].add(name)
    return found


def code_lines(path: Path) -> int:
    """Lines with code: no blank ones, comments or docstrings."""
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    begins = True
    for token in tokens:
        if token.type in skip:
            begins = begins or token.type == tokenize.NEWLINE
            continue
        if not (begins and token.type == tokenize.STRING):  # a string that is a statement: a docstring
            lines.update(range(token.start[0], token.end[0] + 1))
        begins = False
    return len(lines)


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = grimp.build_graph(*FLOORS, cache_dir=None)
    arrows = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"these import each other in a circle: {' → '.join(reversed(error.args[1]))}")


def test_other_rooms_import_only_what_a_room_offers() -> None:
    wrong = []
    for path in FILES:
        here = module(path)
        for home, name in imports(path):
            other = room(f"{home}.{name}") if (ROOT / Path(*home.split("."), f"{name}.py")).exists() else room(home)
            if not other or other == room(here) or other.startswith(f"{here}.") or here.startswith(f"{other}."):
                continue
            if home != other or name not in offered(ROOT / Path(*other.split("."))):
                wrong.append(f"{here} imports {name} from {home}, and {other} does not offer it")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ROOMS, ids=module)
def test_what_a_room_offers_is_there_and_is_wanted(package: Path) -> None:
    names = offered(package)
    loaded = importlib.import_module(module(package))
    for name, home in names.items():
        assert getattr(loaded, name) is not None
        # Importing a submodule sets an attribute of its name, which would hide a function that is called the same.
        assert home == module(package) or not (package / f"{name}.py").exists(), name
    if "lazy" in (package / "__init__.py").read_text():
        assert sorted(set(names) - wanted()[module(package)]) == []


@pytest.mark.parametrize("package", ROOMS, ids=module)
def test_a_room_says_what_it_is_for_and_is_small(package: Path) -> None:
    said = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    assert len(said.split()) >= 12
    assert len(list(package.glob("*.py"))) - 1 <= MODULES


def test_a_file_is_short_enough_to_read_at_a_sitting() -> None:
    long = {module(path): lines for path in FILES if (lines := code_lines(path)) > LINES}
    assert long == {}


def test_the_two_copies_of_lazy_are_one() -> None:
    """infra and unclip know nothing of each other, so each has `exports`; only its docstring may differ."""
    one, other = (ast.parse((ROOT / floor / "lazy.py").read_text()).body for floor in ("infra", "unclip"))
    assert [ast.dump(node) for node in one[:-1]] == [ast.dump(node) for node in other[:-1]]
    assert [ast.dump(node) for node in one[-1].body[1:]] == [ast.dump(node) for node in other[-1].body[1:]]  # type: ignore[attr-defined]
