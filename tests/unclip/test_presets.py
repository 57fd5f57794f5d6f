"""The table of sizes, counted on the meta device, against the numbers that the authors published."""

import pytest
import torch
from torch import nn

from unclip.errors import Refused
from unclip.models.decoder import Decoder
from unclip.models.prior import DiffusionPrior
from unclip.models.upsampler import Upsampler
from unclip.presets import BASE, GLIDE, KARLO, PAPER, Preset, preset


def millions(model: nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def counted(row: Preset) -> tuple[float, float, list[float]]:
    with torch.device("meta"):
        prior, decoder = DiffusionPrior(row.prior), Decoder(row.decoder)
        return millions(prior), millions(decoder), [millions(Upsampler(config)) for config in row.upsamplers]


def test_the_papers_decoder_and_upsamplers_have_the_papers_sizes():
    prior, decoder, upsamplers = counted(PAPER)
    assert [decoder, *upsamplers] == pytest.approx([3500, 700, 300], rel=0.05)
    # The table says 1 B; its own 24 layers of width 2048 are 24 · 12 · 2048² = 1,208 M without a single bias.
    assert prior == pytest.approx(1226, abs=1)


def test_the_paper_preset_follows_the_papers_table():
    prior, decoder, (first, second) = PAPER.prior, PAPER.decoder, PAPER.upsamplers
    assert (prior.context, prior.width, prior.depth, prior.heads) == (256, 2048, 24, 32)
    assert (decoder.channels, decoder.depth, decoder.multiples) == (512, 3, (1, 2, 3, 4))
    assert (decoder.head_channels, decoder.attention, decoder.dropout) == (64, (32, 16, 8), 0.1)
    assert (decoder.context_width, decoder.text_depth, decoder.text_heads) == (2048, 24, 32)
    assert (first.channels, first.depth, first.multiples, first.dropout) == (320, 3, (1, 2, 3, 4), 0.1)
    assert (second.channels, second.depth, second.multiples) == (192, 2, (1, 1, 2, 2, 4, 4))
    assert [config.schedule for config in (prior, decoder, first, second)] == ["cosine"] * 3 + ["linear"]


def test_karlos_prior_counts_1022_million():
    prior, decoder, (upsampler,) = counted(KARLO)
    # Kakao Brain's names: prior 1B, decoder 900M, improved super-resolution 1.4B in two networks.
    assert prior == pytest.approx(1022, abs=0.5)
    assert decoder == pytest.approx(900, rel=0.01)
    assert upsampler == pytest.approx(1400, rel=0.015)


@pytest.mark.slow
def test_karlos_models_count_what_diffusers_own_classes_count():
    from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    # The arguments of diffusers' scripts/convert_kakao_brain_unclip_to_diffusers.py.
    attended = ["SimpleCrossAttnDownBlock2D"] * 3, ["SimpleCrossAttnUpBlock2D"] * 3
    common = {"block_out_channels": (320, 640, 960, 1280), "layers_per_block": 3}
    with torch.device("meta"):
        theirs = [
            millions(PriorTransformer()),
            millions(
                UNet2DConditionModel(
                    sample_size=64, in_channels=3, out_channels=6, cross_attention_dim=1536, attention_head_dim=64,
                    down_block_types=("ResnetDownsampleBlock2D", *attended[0]),
                    up_block_types=(*attended[1], "ResnetUpsampleBlock2D"),
                    mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift",
                    class_embed_type="identity", **common,
                )
            )
            + millions(UnCLIPTextProjModel(time_embed_dim=1280, cross_attention_dim=1536)),
            2
            * millions(
                UNet2DModel(
                    sample_size=256, in_channels=6, out_channels=3, add_attention=False,
                    down_block_types=("ResnetDownsampleBlock2D",) * 4,
                    up_block_types=("ResnetUpsampleBlock2D",) * 4, **common,
                )
            ),
        ]  # fmt: skip
    prior, decoder, (upsampler,) = counted(KARLO)
    # clip_mean and clip_std, 768 numbers each, are parameters there and buffers here.
    assert [prior + 2 * 768 / 1e6, decoder, upsampler] == pytest.approx(theirs, abs=1e-9)


def test_glides_text_transformer_and_the_rest_of_it_have_glides_sizes():
    assert GLIDE.prior is None
    with torch.device("meta"):
        decoder = Decoder(GLIDE.decoder)
    text = decoder.text
    # GLIDE, section 3: 3.5 B, of which 2.3 B draw and 24 blocks of width 2048, 1.2 B, read; we count the table beside.
    assert millions(decoder) == pytest.approx(3500, rel=0.05)
    assert millions(text.blocks) == pytest.approx(1200, rel=0.02)
    assert millions(decoder) - millions(text) == pytest.approx(2300, rel=0.05)
    assert (decoder.config.context, len(text.blocks), text.positions.shape[1]) == (128, 24, 2048)


def test_the_largest_model_of_base_leaves_most_of_a_gpu_to_activations_and_the_papers_does_not():
    """Weights, gradient, two moments and an average in float32 are replicated, so each GPU holds all of them."""
    prior, decoder, upsamplers = counted(BASE)
    assert [prior, decoder, *upsamplers] == pytest.approx([156.5, 319.1, 91.1, 31.4], abs=0.1)
    gigabytes = [5 * 4 * counted(row)[1] / 1e3 for row in (BASE, PAPER)]
    assert gigabytes == pytest.approx([6.4, 69.2], abs=0.1)


def test_an_unknown_preset_is_refused():
    with pytest.raises(Refused, match="karlo"):
        preset("dalle")
