"""The networks: priors, decoder, upsampler, classifier and noised CLIP, and the blocks they are made of.

Each model is a frozen dataclass of settings beside a module that is built from it; no file here reads or writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unclip.lazy import exports

if TYPE_CHECKING:
    from unclip.models.ar_prior import AutoregressivePrior, AutoregressivePriorConfig, Prior, sample_tokens
    from unclip.models.classifier import Classifier, ClassifierConfig
    from unclip.models.decoder import IMAGE_TOKENS, Context, Decoder, DecoderConfig
    from unclip.models.layers import (
        ContextAttention,
        ResBlock,
        TransformerBlock,
        bfloat16_convolutions,
        fold_upsampling,
    )
    from unclip.models.noised_clip import MAX_SCALE, NoisedClip, NoisedClipConfig
    from unclip.models.prior import DiffusionPrior, PriorConfig
    from unclip.models.text import Caption, NullText
    from unclip.models.unet_encoder import HalfUNetConfig, SelfAttention
    from unclip.models.upsampler import WORKSPACE, Upsampler, UpsamplerConfig, pad_to_multiple
else:
    __getattr__ = exports(__name__)
