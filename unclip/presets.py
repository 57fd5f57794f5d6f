"""One table of model sizes: the paper's, Karlo's, a base for one node, the demo's and the tests'.

Widths that come from CLIP (embedding, token states, context) and sides that come from the recipe are filled in by the
recipe with `dataclasses.replace`; here they are those of the CLIP that the row was made for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from unclip.clip import CLIP_VOCABULARY
from unclip.errors import Refused
from unclip.models import AutoregressivePriorConfig, DecoderConfig, HalfUNetConfig, PriorConfig, UpsamplerConfig


@dataclass(frozen=True)
class Preset:
    """The models of one release, text side to largest picture."""

    prior: PriorConfig | None
    """None for a decoder that draws from prompts alone."""
    decoder: DecoderConfig
    upsamplers: tuple[UpsamplerConfig, ...]
    ar_prior: AutoregressivePriorConfig | None = None
    """The prior that may stand in the diffusion prior's place."""
    encoder: HalfUNetConfig | None = None
    """Of a noised classifier, and of a noised CLIP."""


ADM_CLASSIFIER = HalfUNetConfig(
    size=64, channels=128, multiples=(1, 2, 3, 4), depth=4, attention=(32, 16, 8), head_channels=64
)
"""The noised classifier for 64 px of Dhariwal & Nichol 2021, table 12; with 1000 classes 65 M, as the table says. Our
choice for a noised CLIP as well, where GLIDE took a second ViT-L."""

PAPER = Preset(
    prior=PriorConfig(embedding=1024, text_width=1024, context=256, width=2048, depth=24, heads=32),
    decoder=DecoderConfig(
        size=64, embedding=1024, text_width=1024, context=256, channels=512, multiples=(1, 2, 3, 4), depth=3,
        attention=(32, 16, 8), head_channels=64, context_width=2048, text_depth=24, text_heads=32, dropout=0.1,
        learned_range=True,
    ),
    upsamplers=(
        UpsamplerConfig(
            low=64, size=256, channels=320, multiples=(1, 2, 3, 4), depth=3, dropout=0.1, scale_shift=False
        ),
        UpsamplerConfig(
            low=256, size=1024, channels=192, multiples=(1, 1, 2, 2, 4, 4), depth=2, schedule="linear", time_multiple=6
        ),
    ),
    # The table's "text encoder" and "latent decoder". Ours reads the text again in its own sequence of 256 + 1 + 320.
    ar_prior=AutoregressivePriorConfig(
        embedding=1024, text_width=1024, context=256, width=1664, depth=24, heads=26, components=319,
        context_width=2048, text_depth=24, text_heads=32,
    ),
    encoder=ADM_CLASSIFIER,
)  # fmt: skip
"""The table of arXiv 2204.06125, appendix C. Counted: prior 1,226 M (the table says 1 B; 24 layers of width 2048 alone
are 1,209 M), decoder 3,462 M (3.5 B), upsamplers 692 M (700 M) and 298 M (300 M).

Where the paper leaves a freedom:
- CLIP's token states have width 1024, the text encoders read them, and the decoder's context is as wide as its text
  encoder (2048), so that nothing projects between the two.
- The first upsampler adds its time embedding (as Karlo's, made after the same row, does): 692 M. Scale and shift would
  give 730 M.
- The second keeps ADM's scale and shift, under a time embedding of 6 · 192: 298 M. ADM's usual 4 · 192 gives 282 M, and
  nothing else that the table leaves open (no attention, no caption) comes as near.
- Time embeddings otherwise have ADM's width of 4 · channels; blocks halve and double the side inside, as ADM's.
"""

KARLO = Preset(
    prior=PriorConfig(embedding=768, text_width=768, context=77, width=2048, depth=20, heads=32, clip_range=5.0),
    decoder=DecoderConfig(
        size=64, embedding=768, text_width=768, context=77, channels=320, multiples=(1, 2, 3, 4), depth=3,
        attention=(32, 16, 8), head_channels=64, context_width=1536, dropout=0.1, learned_range=True,
    ),
    upsamplers=(
        UpsamplerConfig(
            low=64, size=256, channels=320, multiples=(1, 2, 3, 4), depth=3, scale_shift=False, antialias=True,
            last=True,
        ),
    ),
    encoder=ADM_CLASSIFIER,
)  # fmt: skip
"""Karlo-v1.0.alpha (Kakao Brain 2022) over OpenAI's ViT-L/14: prior 1,022 M, decoder 893 M (Kakao's "900M"), upsampler
2 × 692 M ("1.4B": one network for six steps and one, of the same shape, for the last).

From Kakao's configs/prior_1B_vit_l.yaml and decoder_900M_vit_l.yaml, karlo/models/sr_64_256.py, and diffusers'
scripts/convert_kakao_brain_unclip_to_diffusers.py, which also has the prior's clipping at 5.
"""

BASE = Preset(
    prior=PriorConfig(embedding=768, text_width=768, context=77, width=1024, depth=12, heads=16),
    decoder=DecoderConfig(
        size=64, embedding=768, text_width=768, context=77, channels=192, multiples=(1, 2, 3, 4), depth=3,
        attention=(32, 16, 8), head_channels=64, context_width=768, learned_range=True,
    ),
    upsamplers=(
        UpsamplerConfig(low=64, size=256, channels=128, multiples=(1, 2, 3, 4), depth=2, antialias=True),
        UpsamplerConfig(low=256, size=1024, channels=64, multiples=(1, 1, 2, 2, 4, 4), depth=2, antialias=True),
    ),
    ar_prior=AutoregressivePriorConfig(embedding=768, text_width=768, context=77, width=1024, depth=12, heads=16),
    encoder=ADM_CLASSIFIER,
)  # fmt: skip
"""For one node of 8 GPUs, over any ViT-L/14: prior 156 M (autoregressive 157 M), decoder 319 M, upsamplers 91 M and
31 M.

The largest fits because nothing has to be sharded: float32 weights, gradient, AdamW's two moments and the moving
average are 20 bytes a number, 6.4 GB for the decoder on each GPU (the paper's takes 69 GB); the rest is activations'.
"""

DEMO = Preset(
    prior=PriorConfig(embedding=128, text_width=64, context=24, width=128, depth=3, heads=4),
    decoder=DecoderConfig(
        size=32, embedding=128, text_width=64, context=24, channels=64, multiples=(1, 2), depth=1, attention=(4,),
        head_channels=32, context_width=128, text_depth=1, text_heads=4, groups=16, unshuffle=4, position=True,
        prediction="x0",
    ),
    upsamplers=(
        UpsamplerConfig(
            low=32, size=64, channels=48, multiples=(1, 2), depth=1, groups=16, unshuffle=4, prediction="x0"
        ),
        UpsamplerConfig(
            low=64, size=128, channels=32, multiples=(1, 2), depth=1, groups=8, unshuffle=4, prediction="x0"
        ),
    ),
    ar_prior=AutoregressivePriorConfig(
        embedding=128, text_width=64, context=24, width=128, depth=3, heads=4, buckets=128
    ),
    encoder=HalfUNetConfig(
        size=32, channels=64, multiples=(1, 2), depth=1, attention=(4,), head_channels=32, groups=16, unshuffle=4
    ),
)  # fmt: skip
"""For ten minutes on two cores: prior 0.7 M, decoder 3.8 M, upsamplers 1.8 M and 0.8 M; x0-prediction and unshuffled
pixels, of which docs/demo.md has the comparisons."""

TINY = Preset(
    prior=PriorConfig(embedding=32, text_width=32, context=24, width=32, depth=1, heads=2),
    decoder=DecoderConfig(
        size=16, embedding=32, text_width=32, context=24, channels=16, multiples=(1, 2), depth=1, attention=(8,),
        head_channels=16, context_width=32, groups=8, learned_range=True,
    ),
    upsamplers=(
        UpsamplerConfig(low=16, size=32, channels=16, multiples=(1, 2), depth=1, groups=8, antialias=True),
        UpsamplerConfig(low=32, size=64, channels=16, multiples=(1, 2), depth=1, groups=8, antialias=True),
    ),
    ar_prior=AutoregressivePriorConfig(
        embedding=32, text_width=32, context=24, width=32, depth=1, heads=2, components=6, buckets=16
    ),
    encoder=HalfUNetConfig(
        size=16, channels=16, multiples=(1, 2), depth=1, attention=(8,), head_channels=16, groups=8
    ),
)  # fmt: skip
"""What diffusers' UnCLIPPipeline can hold: no unshuffling, no positions, no text blocks, one width for all of CLIP.

Context + 4 tokens must differ from the pixels of an attended level: at equal lengths diffusers would not pad its mask.
"""

GLIDE = Preset(
    prior=None,
    decoder=replace(PAPER.decoder, context=128, text="own", vocabulary=CLIP_VOCABULARY, image=False),
    upsamplers=PAPER.upsamplers,
)
"""GLIDE (arXiv 2112.10741, section 3), which draws from prompts alone: the paper's decoder is built after it, with z_i
added. Counted: 3,552 M (GLIDE says 3.5 B), of which its text transformer of 24 blocks of width 2048 is 1,310 M (1.2 B;
1,209 M without the table of tokens) and the rest 2,242 M (2.3 B).

GLIDE's context of 128 tokens is the CLIP's here, since the tokeniser is, which has the table's size too. Its own
upsampler of 1.5 B reads the caption again; ours do not, as those of DALL·E 2.
"""

PRESETS = {"paper": PAPER, "glide": GLIDE, "karlo": KARLO, "base": BASE, "demo": DEMO, "tiny": TINY}


def preset(name: str) -> Preset:
    """A row of the table by name."""
    if name not in PRESETS:
        raise Refused(f"preset {name!r} is unknown; use one of {', '.join(PRESETS)}")
    return PRESETS[name]
