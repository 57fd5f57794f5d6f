"""What a package offers, loaded when it is first asked for (PEP 562)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def exports(package: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package: the names that its `__init__.py` imports under `if TYPE_CHECKING:`.

    So a name stands once, as an import that editors and type checkers follow, and whoever imports the package pays for
    what it uses alone: who reads a configuration does not load torch. infra has a copy of this file,
    since it and unclip know nothing of each other.
    """
    tree = ast.parse(Path(str(sys.modules[package].__file__)).read_text(encoding="utf-8"))
    blocks = [node.body for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: str(node.module) for node in imports for alias in node.names}

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        found = import_module(f"{package}.{name}") if home == package else getattr(import_module(home), name)
        setattr(sys.modules[package], name, found)  # the next time it is found without this function
        return found

    return load
