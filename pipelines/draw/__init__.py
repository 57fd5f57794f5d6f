"""Pictures from a release by command: from text, or from other pictures.

In go a reference of a release and an order; out comes a grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from pipelines.draw import edit
    from pipelines.draw.generate import generate_grid
else:
    __getattr__ = exports(__name__)
