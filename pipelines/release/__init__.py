"""A release of a store: bundled from models, found by name, opened as a folder.

In go records of models; out comes one consistent release, or a folder of diffusers'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from pipelines.release import diffusers
    from pipelines.release.bundle import Bundle, BundleSpec
    from pipelines.release.open import CHAMPION, bundles, find_release, only_line, open_release, release_cache
else:
    __getattr__ = exports(__name__)
