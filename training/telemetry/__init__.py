"""What is seen of a fit while it trains: losses, where the time goes, MFU, pictures.

In go the loop's figures; out go messages to the run's monitor. Nothing here changes what is trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from training.telemetry.clock import SUMS, Clock, Monitor, by_quartile
    from training.telemetry.preview import Previews
else:
    __getattr__ = exports(__name__)
