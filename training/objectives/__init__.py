"""What each kind of model learns: the rows it reads, its network, and its loss on a micro-batch.

In goes a job; out comes an objective, the whole difference between fits: the loop knows no kind of model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from training.objectives.base import Losses, Objective, read_text
    from training.objectives.choice import objective
else:
    __getattr__ = exports(__name__)
