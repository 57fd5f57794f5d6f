"""How weights change: AdamW and Muon, precision, moving averages, steps that are not taken.

In goes a gradient in one flat vector; out come new weights and their averages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from training.optim.averages import Averages
    from training.optim.ema import Ema
    from training.optim.muon import is_inner
    from training.optim.optimizer import Diverged, Optimiser, learning_rate
    from training.optim.precision import Precision, in_float32
    from training.optim.spikes import Spikes
else:
    __getattr__ = exports(__name__)
