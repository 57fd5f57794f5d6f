"""What makes the networks fast changes no result: each short cut against the long way and torch's own bricks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.fixtures.plain import shaken
from unclip.diffusion.guidance import classifier_free, conditional, join
from unclip.diffusion.samplers import ddim
from unclip.models.layers import UpConv2d, attend, fold_upsampling
from unclip.models.prior import DiffusionPrior, PriorContext
from unclip.models.unet import UNet
from unclip.presets import TINY

B, L = 3, TINY.prior.context
LENGTHS = (1, 7, L)


def prior() -> DiffusionPrior:
    made = shaken(DiffusionPrior(replace(TINY.prior, depth=3)), 5)
    assert isinstance(made, DiffusionPrior)
    return made.eval()


def captions() -> PriorContext:
    torch.manual_seed(6)
    mask = torch.arange(L)[None] < torch.tensor(LENGTHS)[:, None]
    return PriorContext(torch.randn(B, 32), torch.randn(B, L, 32), mask)


@torch.no_grad()
def test_a_prior_that_has_read_its_captions_says_the_same_at_every_timestep():
    model, context = prior(), captions()
    memory = model.read(context)
    for t in ([0, 400, 999], [999, 1, 400]):
        z = torch.randn(B, 32)
        whole = model(z, torch.tensor(t), *context)
        assert whole.std() > 0.1
        assert torch.allclose(model.resume(z, torch.tensor(t), memory), whole, atol=2e-6)


@torch.no_grad()
def test_padding_is_not_read():
    model, context = prior(), captions()
    other = torch.where(context.text_mask[..., None], context.text_states, torch.full((), 9.0))
    z, t = torch.randn(B, 32), torch.tensor([0, 400, 999])
    made = [model.resume(z, t, model.read(context._replace(text_states=states))) for states in (context[1], other)]
    assert torch.allclose(*made, atol=1e-6)


@torch.no_grad()
def test_memories_are_guided_as_captions_are():
    """Joined for one batched call, over a whole sampling; and no step leaves a trace in what the next one reads."""
    model, context = prior(), captions()
    null = model.null_context(B)
    memories = model.read(context), model.read(null)
    schedule, x = model.schedule.respace(5), torch.randn(B, 32)
    before = [part.clone() for part in join(*memories).keys_values]
    slow = ddim(classifier_free(model.denoise, context, null, 3.0), x, schedule)
    fast = ddim(classifier_free(model.denoise, *memories, 3.0), x, schedule)
    assert torch.allclose(fast, slow, atol=1e-4 * float(slow.abs().max()))
    assert not torch.allclose(slow, ddim(conditional(model.denoise, context), x, schedule), atol=1e-2)
    assert all(torch.equal(*pair) for pair in zip(before, join(*memories).keys_values, strict=True))


def conv(folded: bool) -> UpConv2d:
    torch.manual_seed(7)
    made = UpConv2d(8, 6, 3, padding=1).double()
    made.folded = folded
    return made


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sides", [(32, 32), (33, 40)])
def test_a_folded_upsampling_is_a_convolution_of_the_doubled_picture(sides, layout):
    """In float64, to its rounding: values and all gradients, at edges and odd sides too."""
    x = torch.randn(2, 8, *sides, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    found = []
    for folded in (False, True):
        made = conv(folded)
        out = made.doubled(x)
        wanted = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), made.weight, made.bias, padding=1)
        assert torch.allclose(out, wanted, atol=1e-12)
        inputs = (x, made.weight, made.bias)
        found.append(torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), inputs))
    for plain, fast in zip(*found, strict=True):
        assert torch.allclose(plain, fast, rtol=1e-9, atol=1e-9)


def test_folding_is_asked_for_and_only_where_it_pays():
    config = replace(TINY.decoder.unet, size=64, attention=(), unshuffle=1, position=False)
    model = shaken(UNet(config), 8)
    seen: list[tuple[int, ...]] = []
    ups = [module for module in model.modules() if isinstance(module, UpConv2d)]
    for module in ups:
        module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[2:]))
    x, t = torch.randn(1, 3, 64, 64), torch.tensor([5])
    with torch.no_grad():
        plain = model(x, t)
        assert len(seen) == len(ups) == len(config.multiples) - 1
        fold_upsampling(model)
        seen.clear()
        folded = model(x, t)
    assert len(seen) == len(ups) - 1, "the block from 32 to 64 px no longer doubles first"
    assert not torch.equal(plain, folded)
    assert torch.allclose(plain, folded, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_in_bfloat16_is_nearer_the_exact_one_than_torchs_forward_and_backward(autocast: bool) -> None:
    torch.manual_seed(9)
    shapes = (2, 3, 16, 8), (2, 3, 21, 8), (2, 3, 21, 8)
    inputs = [torch.randn(shape).bfloat16() for shape in shapes]
    mask, towards = torch.rand(2, 1, 16, 21) < 0.7, torch.randn(shapes[0])
    mask[..., 0] = True

    def found(attention, dtype: torch.dtype) -> list[torch.Tensor]:
        """The result, and the gradients of q, k and v."""
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
            made = attention(*leaves, mask)
        assert made.dtype == dtype
        made.backward(towards.to(made.dtype))
        return [tensor.double() for tensor in (made.detach(), *(leaf.grad for leaf in leaves))]

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    towards = towards.bfloat16().double()
    exact = found(fused, torch.float64)
    for ours, torchs, true in zip(found(attend, torch.bfloat16), found(fused, torch.bfloat16), exact, strict=True):
        assert (ours - true).norm() < (torchs - true).norm()


@torch.no_grad()
def test_attention_without_a_gradient_is_torchs_to_the_bit() -> None:
    torch.manual_seed(9)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(2, 3, 16, 8).to(dtype) for _ in range(3))
        assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))
