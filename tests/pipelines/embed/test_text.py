"""Captions are read once, in calls of fixed shapes: an embedding depends on its caption alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import Refused
from pipelines.embed.prefetch import DeviceCopier
from pipelines.embed.text import Captions
from unclip.clip.model import Clip, build_clip

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
    "text_cfg": {"context_length": 24, "vocab_size": 2000, "width": 32, "heads": 2, "layers": 2},
}
WORDS = ("a", "red", "circle", "left", "of", "the", "small", "blue", "square")


def made(**text) -> Clip:
    torch.manual_seed(0)
    model = MODEL | {"text_cfg": MODEL["text_cfg"] | text}
    return Clip.of(build_clip(model), model)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return made()


def captions(clip: Clip, texts, lengths=(), batch: int = 8) -> Captions:
    return Captions(clip, DeviceCopier(clip.device), texts, lengths, batch)


def read(clip: Clip, texts, **options) -> torch.Tensor:
    found = captions(clip, texts, **options)
    found.ask(range(len(texts)))
    return found.take(range(len(texts)))


TEXTS = st.lists(st.lists(st.sampled_from(WORDS), max_size=30).map(" ".join), min_size=1, max_size=30)


@settings(max_examples=15, deadline=None)
@given(texts=TEXTS, lengths=st.sampled_from([(), (4,), (6, 12), (8, 16, 24), (8, 77)]), batch=st.integers(1, 12))
def test_embeddings_are_clips_own_whatever_captions_are_filled_up_to(clip, texts, lengths, batch):
    whole = clip.model.encode_text(clip.tokenize(texts)).detach()  # open_clip's own tower, over the whole context
    assert torch.allclose(read(clip, texts, lengths=lengths, batch=batch), whole, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(texts=TEXTS, others=TEXTS, lengths=st.sampled_from([(), (6, 12)]))
def test_an_embedding_does_not_depend_on_its_neighbours_to_the_last_bit(clip, texts, others, lengths):
    alone = read(clip, texts, lengths=lengths)
    among = read(clip, [*others, *texts], lengths=lengths)[len(others) :]
    assert torch.equal(alone, among)


@settings(max_examples=15, deadline=None)
@given(texts=TEXTS, order=st.randoms(use_true_random=False), part=st.integers(1, 9))
def test_the_order_in_which_they_are_asked_for_changes_nothing(clip, texts, order, part):
    rows = list(range(len(texts)))
    order.shuffle(rows)
    found = captions(clip, texts, lengths=(6, 12))
    parts = [rows[at : at + part] for at in range(0, len(rows), part)]
    for now, following in zip(parts, [*parts[1:], []], strict=True):
        found.ask(now)
        found.ask(following)  # as embed does: the next batch is asked for before this one is taken
        assert torch.equal(found.take(now), read(clip, texts, lengths=(6, 12))[now])


def test_short_captions_cost_their_own_length(clip):
    from torch.utils.flop_counter import FlopCounterMode

    def flops(lengths) -> int:
        with FlopCounterMode(display=False) as counter:
            read(clip, ["a red circle"] * 16, lengths=lengths)
        return counter.get_total_flops()

    assert flops((12,)) < flops(()) * 0.52  # 12 of 24 tokens; the projection costs the same


def test_a_tower_that_sees_padding_is_refused():
    with pytest.raises(Refused, match=r"embed\.lengths"):
        captions(made(no_causal_mask=True), ["a"], lengths=(8,))
