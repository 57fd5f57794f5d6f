"""Plug-ins: modules from outside that add rows to the product's tables as they are imported (docs/extend.md)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import import_module

from infra.errors import Refused

VARIABLE = "UNCLIP_PLUGINS"
"""The environment variable that names them, separated by commas; a recipe names them as `plugins`."""


def load_plugins(modules: Iterable[str] = ()) -> list[str]:
    """Imports these modules behind those that the environment names, and returns the names of all.

    They are in the environment from then on, so that processes which this one starts can do the same. Raises Refused
    where one cannot be imported.
    """
    names = list(dict.fromkeys([*filter(None, os.environ.get(VARIABLE, "").split(",")), *modules]))
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise Refused(f"plug-in {name!r} cannot be imported: {error}") from error
    if names:
        os.environ[VARIABLE] = ",".join(names)
    return names
