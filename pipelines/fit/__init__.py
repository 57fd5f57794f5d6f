"""Models as stages: a fit on Ray Train, a CLIP that is loaded or taken, the prior's noise table.

In go versions of data and a model's settings; out comes a record with its weights. What a fit asks of a machine is
estimated here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from pipelines.fit import estimate
    from pipelines.fit.clip import LoadClip, LoadHow, LoadSpec, TakeClip, TakeSpec
    from pipelines.fit.data_stages import CHAIN, DATA, STEPS
    from pipelines.fit.estimate import Accelerator
    from pipelines.fit.gamma import Gamma, wants_gamma
    from pipelines.fit.stage import Fit, FitSpec
else:
    __getattr__ = exports(__name__)
