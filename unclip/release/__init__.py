"""Models on disk: one model's folder, and a whole release with the digest of every file.

In go trained weights; out come modules that fit together, or a refusal that names what does not. Nothing of a folder is
ever executed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unclip.lazy import exports

if TYPE_CHECKING:
    from unclip.release.compatibility import check_fit, check_gamma, check_guides
    from unclip.release.folder import MANIFEST, Release, decoder_settings, load_models, read_release, save_release
    from unclip.release.guides import Guides
    from unclip.release.model import (
        KINDS,
        config_from,
        load_model,
        read_model_config,
        save_gamma,
        save_model,
        warm_start,
    )
else:
    __getattr__ = exports(__name__)
