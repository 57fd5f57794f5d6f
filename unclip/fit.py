"""Do the models of a cascade fit together? Answered from their configurations alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unclip.ar_prior import AutoregressivePriorConfig
from unclip.decoder import DecoderConfig
from unclip.errors import Refused
from unclip.half_unet import HalfUNetConfig
from unclip.noised_clip import NoisedClipConfig
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


def check_guides(decoder: DecoderConfig, embedding: int, guides: Mapping[str, HalfUNetConfig]) -> None:
    """Raises Refused, naming both sides, for a guide that was made for another decoder or another CLIP.

    embedding: width of CLIP's embeddings. guides: component of the release → its configuration.
    """
    for name, config in guides.items():
        for field in ("size", "schedule", "timesteps"):
            if getattr(config, field) != getattr(decoder, field):
                raise Refused(
                    f"this {name} was made for {field} {getattr(config, field)}, and the decoder's is "
                    f"{getattr(decoder, field)}: it would read pictures that it never saw"
                )
        if isinstance(config, NoisedClipConfig) and config.embedding != embedding:
            raise Refused(f"this {name} was made for embedding {config.embedding}, and CLIP's is {embedding}")
