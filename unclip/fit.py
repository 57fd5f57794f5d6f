"""Do the models of a cascade fit together? Answered from their configurations alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unclip.ar_prior import AutoregressivePriorConfig
from unclip.decoder import DecoderConfig
from unclip.errors import Refused
from unclip.prior import PriorConfig
from unclip.upsampler import UpsamplerConfig


def check_fit(
    clip: Mapping[str, int],
    prior: PriorConfig | AutoregressivePriorConfig,
    decoder: DecoderConfig,
    upsamplers: Sequence[UpsamplerConfig],
) -> None:
    """Raises Refused, naming both sides, where models do not fit together.

    clip: its `embedding` and `text_width`, and its `context` in tokens.
    """
    configs: dict[str, PriorConfig | AutoregressivePriorConfig | DecoderConfig] = {"prior": prior, "decoder": decoder}
    for name, config in configs.items():
        for field, width in clip.items():
            if getattr(config, field) != width:
                raise Refused(f"this {name} was made for {field} {getattr(config, field)}, and CLIP's is {width}")
    below, size = "decoder", decoder.size
    for upsampler in upsamplers:
        name = f"upsampler-{upsampler.size}"
        if upsampler.low != size:
            raise Refused(f"{name} takes pictures of {upsampler.low} px, and the {below} gives {size} px")
        below, size = name, upsampler.size
