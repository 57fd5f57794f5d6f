"""Where samples come from: lists of URLs, webdataset tars, folders of pictures.

In go files; out come slices of rows, cut by content, so that a changed row touches its own slice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from pipelines.source.columns import Columns, columns_of
    from pipelines.source.files import Unreadable, open_location
    from pipelines.source.stage import Source, SourceHow, SourceSpec
else:
    __getattr__ = exports(__name__)
