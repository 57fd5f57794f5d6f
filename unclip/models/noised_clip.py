"""A noised CLIP: an image encoder of x_t that points where CLIP's text embedding does (GLIDE, Nichol et al. 2021, 2.3).

GLIDE trains a second CLIP, both towers, on noised pictures. Here only the image side is new, the classifier's encoder,
and it learns against the text embeddings of the release's own, frozen CLIP: so its gradient leads into the very space
that prior and decoder speak, what embed stored is all that it trains on, and no tower of open_clip has to learn of t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from unclip.config import WIDTH, outside
from unclip.diffusion import Schedule
from unclip.errors import Refused
from unclip.models.unet_encoder import HalfUNet, HalfUNetConfig

MAX_SCALE = 100.0
"""Upper bound of the learned inverse temperature (Radford et al. 2021, section 2.5), which starts at 1/0.07."""


@dataclass(frozen=True)
class NoisedClipConfig(HalfUNetConfig):
    """Shape and process of a noised CLIP."""

    embedding: int = field(kw_only=True)
    """Width d of CLIP's embeddings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := outside(self, embedding=WIDTH):
            raise Refused(f"noised CLIP: {wrong}")


class NoisedClip(nn.Module):
    """x_t, t → an embedding whose direction is compared with CLIP's text embeddings."""

    def __init__(self, config: NoisedClipConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = HalfUNet(config, config.embedding)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @cached_property
    def schedule(self) -> Schedule:
        """The process whose pictures it reads."""
        return Schedule.named(self.config.schedule, self.config.timesteps)

    @property
    def scale(self) -> Tensor:
        """The inverse temperature exp(logit scale), at most `MAX_SCALE`."""
        return self.logit_scale.clamp(max=math.log(MAX_SCALE)).exp()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Noised pictures x [b, 3, s, s], t [b] → embeddings [b, d], not normalised."""
        return self.encoder(x, t)
