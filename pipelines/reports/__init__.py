"""Pages for people: about the data, and about a release.

In go versions of data and scores; out comes HTML that needs no network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from pipelines.reports import data
    from pipelines.reports.count import Count
    from pipelines.reports.data import PAGE, DataReport
    from pipelines.reports.page import names_samples
    from pipelines.reports.release import Report
else:
    __getattr__ = exports(__name__)
