"""unCLIP (DALL·E 2, arXiv 2204.06125): the models and the mathematics, in torch alone.

from unclip import UnCLIP
pictures = UnCLIP.load("release/").generate(["a large red circle"], seeds=[0])   # uint8 [1, 3, h, w]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unclip.cascade import UnCLIP
    from unclip.diffusion.settings import Sampling

__all__ = ["Sampling", "UnCLIP", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Importing unclip must stay cheap: torch comes with the first use of UnCLIP (PEP 562).
    if name == "UnCLIP":
        from unclip.cascade import UnCLIP

        return UnCLIP
    if name == "Sampling":
        from unclip.diffusion.settings import Sampling

        return Sampling
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
