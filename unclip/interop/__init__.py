"""Folders of diffusers' UnCLIPPipeline (Karlo's layout), read as a release and written from one.

What cannot be held exactly is refused, in both directions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unclip.lazy import exports

if TYPE_CHECKING:
    from unclip.interop.diffusers import export_diffusers, import_diffusers
else:
    __getattr__ = exports(__name__)
