"""Do the models of a cascade fit together? Answered from their configurations alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unclip.errors import Refused
from unclip.models import (
    AutoregressivePriorConfig,
    DecoderConfig,
    HalfUNetConfig,
    NoisedClipConfig,
    PriorConfig,
    UpsamplerConfig,
)


def check_fit(
    clip: Mapping[str, int],
    prior: PriorConfig | AutoregressivePriorConfig | None,
    decoder: DecoderConfig,
    upsamplers: Sequence[UpsamplerConfig],
    inpainter: DecoderConfig | None = None,
) -> None:
    """Raises Refused, naming both sides, where models do not fit together.

    clip: its `embedding` and `text_width`, its `context` in tokens and the `vocabulary` of its tokeniser
    (`unclip.clip.model.clip_widths`). A prior is there if and only if the decoder draws from image embeddings.
    """
    if decoder.image and prior is None:
        raise Refused("this cascade has no prior, and its decoder draws from the image embeddings that a prior makes")
    if prior is not None and not decoder.image:
        raise Refused("this decoder draws from prompts alone, so that nothing would use the prior")
    named: dict[str, PriorConfig | AutoregressivePriorConfig | DecoderConfig | None]
    named = {"prior": prior, "decoder": decoder, "inpainter": inpainter}
    for name, config in named.items():
        for field, width in clip.items() if config is not None else ():
            if field == "vocabulary" and getattr(config, "text", "clip") != "own":
                continue
            if getattr(config, field) != width:
                raise Refused(f"this {name} was made for {field} {getattr(config, field)}, and CLIP's is {width}")
    if inpainter is not None:
        _check_inpainter(inpainter, decoder)
    below, size = "decoder", decoder.size
    for upsampler in upsamplers:
        name = f"upsampler-{upsampler.size}"
        if upsampler.low != size:
            raise Refused(f"{name} takes pictures of {upsampler.low} px, and the {below} gives {size} px")
        below, size = name, upsampler.size


def _check_inpainter(inpainter: DecoderConfig, decoder: DecoderConfig) -> None:
    if not inpainter.inpaint:
        raise Refused("this inpainter has no channels for what is known of a picture (inpaint)")
    # The guides and the settings are the decoder's, so the process and its variances must be the same as well.
    for field in ("size", "image", "text", "schedule", "timesteps", "learned_range"):
        one, other = getattr(inpainter, field), getattr(decoder, field)
        if one != other:
            raise Refused(f"this inpainter has {field} {one}, and the decoder {other}: it cannot draw in its place")


def check_gamma(lengths: Mapping[str, int], timesteps: Mapping[str, int | None]) -> None:
    """Raises Refused for a table of γ (unclip/diffusion/analytic.py) that is of none of these models' processes.

    lengths: model → entries of its table. timesteps: model → those of its process, None where it has none.
    """
    for name, length in lengths.items():
        if timesteps.get(name) != length:
            found = f"{timesteps[name]} timesteps" if timesteps.get(name) else "no process of noise"
            raise Refused(f"gamma has {length} entries for the {name}, and this cascade's {name} has {found}")


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
