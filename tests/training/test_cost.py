from __future__ import annotations

import weakref
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.fixtures.fits import CLIP
from training.cost import cost, parameters
from training.parallel.flat import STATE_BYTES
from training.parallel.modes import recompute
from unclip.errors import Refused
from unclip.models.ar_prior import AutoregressivePrior
from unclip.models.decoder import Decoder
from unclip.models.prior import DiffusionPrior
from unclip.models.upsampler import Upsampler
from unclip.presets import PAPER, TINY


def test_the_count_is_that_of_the_real_model():
    real = sum(parameter.numel() for parameter in DiffusionPrior(TINY.prior).parameters())
    assert parameters("prior", asdict(TINY.prior)) == real


def test_an_autoregressive_prior_whose_components_are_not_chosen_yet_is_counted_with_all():
    assert TINY.ar_prior is not None
    config = replace(TINY.ar_prior, components=None)
    real = sum(parameter.numel() for parameter in AutoregressivePrior(replace(config, components=32)).parameters())
    assert parameters("ar_prior", asdict(config)) == real


def test_the_papers_models_are_counted_without_being_allocated():
    billions = parameters("decoder", asdict(PAPER.decoder)) / 1e9
    assert 2 < billions < 5


@pytest.mark.slow
def test_a_clip_is_counted_from_open_clips_configuration():
    assert parameters("clip", CLIP) == 367_645


def test_an_impossible_configuration_is_refused():
    with pytest.raises(Refused, match="heads"):
        parameters("prior", asdict(TINY.prior) | {"heads": 3})


@pytest.mark.parametrize("preset", [TINY, PAPER], ids=["tiny", "paper"])
def test_a_transformers_operations_are_six_a_weight_and_token_and_its_attention(preset):
    config = preset.prior
    tokens, width = config.context + 4, config.width
    blocks = config.depth * 12 * width**2
    attention = config.depth * 4 * tokens**2 * width
    by_hand = tokens * (6 * blocks + 4 * config.text_width * width) + 3 * attention  # no gradient of the token states
    assert cost("prior", asdict(config)).flops == pytest.approx(by_hand, rel=0.03)


def test_a_convolutional_models_operations_are_those_that_its_layers_are_seen_to_do():
    seen = 0

    def look(layer, inputs, output):
        nonlocal seen
        places = output.shape[2:].numel() if isinstance(layer, nn.Conv2d) else output.shape[1:-1].numel()
        seen += 3 * 2 * layer.weight.numel() * places

    config = TINY.upsamplers[0]
    upsampler = Upsampler(config)
    for layer in upsampler.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(look)
    upsampler(torch.zeros(1, 3, 32, 32), torch.ones(1, dtype=torch.long), torch.zeros(1, 3, config.low, config.low))
    assert cost("upsampler", asdict(config)).flops == pytest.approx(seen, rel=0.03)


def test_what_is_kept_for_the_backward_pass_is_what_a_real_pass_keeps():
    decoder, kept = Decoder(TINY.decoder).train(), {}
    config = decoder.config
    own = {weight.untyped_storage()._cdata for weight in (*decoder.parameters(), *decoder.buffers())}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    text = torch.zeros(1, config.embedding), torch.zeros(1, config.context, config.text_width)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        context = decoder.context(torch.zeros(1, config.embedding), *text, torch.ones(1, config.context) > 0)
        output = decoder(torch.zeros(1, 3, config.size, config.size), torch.ones(1, dtype=torch.long), context)
        found = cost("decoder", asdict(config))
        assert output.requires_grad
    assert found.activations == pytest.approx(sum(kept.values()), rel=0.1)
    assert found.memory(4) == found.parameters * STATE_BYTES + 4 * found.activations
    assert found.memory(4, shards=2) == found.parameters * STATE_BYTES // 2 + 4 * found.activations


class Living(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside it and live, and their most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known = set()

    def _gone(self, number, size):
        self._known.discard(number)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known | before:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_more_samples_take_as_much_more_memory_as_the_cost_says(precision, again):
    config = TINY.decoder
    most = []
    for count in (4, 12):
        decoder = Decoder(config).train()
        if again:
            recompute(decoder)
        text = torch.zeros(count, config.embedding), torch.zeros(count, config.context, config.text_width)
        picture = torch.zeros(count, 3, config.size, config.size)
        with Living() as living:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                context = decoder.context(text[0], *text, torch.ones(count, config.context) > 0)
                output = decoder(picture, torch.ones(count, dtype=torch.long), context)
            output.float().sum().backward()
        most.append(living.most)
    found = cost("decoder", asdict(config), precision=precision, recompute=again)
    each = (most[1] - most[0]) / 8
    # Beside what is kept there are gradients of a few layers, and when the largest block is computed again, what later
    # blocks were given is gone.
    assert 0.85 * each < found.activations < 1.2 * each


@pytest.mark.slow
def test_a_second_computation_costs_a_third_more_and_half_precision_a_copy_of_the_weights():
    plain, low = (cost("decoder", asdict(TINY.decoder), precision=p, recompute=True) for p in ("float32", "bfloat16"))
    assert 0.25 * plain.flops < plain.again < plain.flops / 3
    assert (low.flops, low.again) == (plain.flops, plain.again)
    assert (plain.copies, low.copies) == (0, 2 * low.parameters)
    assert low.memory(4, shards=2) == low.parameters * STATE_BYTES // 2 + low.copies + 4 * low.activations


def test_clips_towers_are_computed_again_as_well():
    config = {**CLIP, "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}}
    plain, again = (cost("clip", config, recompute=recompute) for recompute in (False, True))
    assert again.activations < 0.6 * plain.activations
    assert 0.25 * plain.flops < again.again < plain.flops / 3


@pytest.mark.slow
def test_a_gpu_keeps_norms_in_float32():
    on_cpu, on_gpu = (cost("decoder", asdict(TINY.decoder), precision="bfloat16", gpu=gpu) for gpu in (False, True))
    whole = cost("decoder", asdict(TINY.decoder))
    assert on_cpu.activations < on_gpu.activations < whole.activations


def test_a_crop_costs_as_much_less_as_it_is_smaller():
    config = asdict(TINY.upsamplers[1])
    whole, crop = cost("upsampler", config), cost("upsampler", config, TINY.upsamplers[1].size // 2)
    assert crop.flops == pytest.approx(whole.flops / 4, rel=0.01)
    assert crop.parameters == whole.parameters


@pytest.mark.slow
def test_every_kind_has_a_cost(tmp_path):
    from tests.fixtures.fits import tiny

    data = tiny(tmp_path / "store")
    for kind in ("clip", "prior", "ar_prior", "decoder", "inpainter", "upsampler", "classifier", "noised_clip"):
        found = cost(kind, data.job(kind).model)
        assert found.flops > 2 * found.parameters / 10
        assert found.activations > 0
