"""unCLIP (DALL·E 2, arXiv 2204.06125): the models and the mathematics, in torch alone.

from unclip import UnCLIP
pictures = UnCLIP.load("release/").generate(["a large red circle"], seeds=[0])   # uint8 [1, 3, h, w]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unclip.lazy import exports

if TYPE_CHECKING:
    from unclip.cascade import UnCLIP
    from unclip.diffusion.settings import Sampling
else:
    __getattr__ = exports(__name__)

__version__ = "0.1.0"
