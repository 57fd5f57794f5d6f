"""Slices of a list become shards of pictures: fetched, checked, resized and packed.

In goes a slice; out come a tar and its index, in which every row ends in exactly one state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from pipelines.download.gather import Gather, GatherHow, check_unused
    from pipelines.download.images import FORMATS, SUFFIXES, PictureSpec, decode_picture, picture
    from pipelines.download.redact import redact_tar
    from pipelines.download.shard import TABLE, TAR, shard_record
    from pipelines.download.stage import Download, DownloadHow, DownloadSpec
else:
    __getattr__ = exports(__name__)
