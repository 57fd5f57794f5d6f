"""How a picture is spoilt before an upsampler learns to mend it: blur, noise, resizing and JPEG (BSR).

In go pictures and a seed each; out come pictures of the same size, whatever else is in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unclip.lazy import exports

if TYPE_CHECKING:
    from unclip.degrade.bsr import BSR_FULL, BSR_LIGHT, bsr_degrade, gaussian_blur
    from unclip.degrade.filters import mirrored
else:
    __getattr__ = exports(__name__)
