"""Our tokeniser against open_clip's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unclip.clip.tokenizer import CLIP_VOCABULARY, FIXED, Tokenizer
from unclip.errors import Refused

TEXTS = [
    "",
    "a large red circle on a white background",
    "A photo of a CAT's   paw, isn't it?  1234 dogs!!",
    "café naïve \u201cquoted\u201d — ﬁne",
    "&lt;b&gt; Tom &amp;amp; Jerry",
    "дом 家 ３ Ⅷ ½ 🙂👍🏽",
    "line one\nline two\ttabbed",
    "sÃ£o paulo mojibake",
    "<start_of_text> and <end_of_text> inside",
    "don't we'll they've I'M you'd",
    "under_score snake_case #hash @user http://a.b/c?d=e&f=g",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "x" * 300,
]


@pytest.fixture(scope="module")
def theirs():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer(77)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_open_clip(ours, theirs, text):
    assert ours.encode(text) == theirs.encode(text)


def test_rows_are_those_of_open_clip_also_where_a_text_is_cut(ours, theirs):
    long = " ".join(["circle"] * 200)
    assert torch.equal(ours([*TEXTS, long]), theirs([*TEXTS, long]))


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_gives_open_clips_ids(text):
    from open_clip.tokenizer import _tokenizer

    assert Tokenizer.encode(_OURS, text) == _tokenizer.encode(text)


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(max_codepoint=127), max_size=40))
def test_any_ascii_text_gives_open_clips_ids(text):
    from open_clip.tokenizer import _tokenizer

    assert Tokenizer.encode(_OURS, text) == _tokenizer.encode(text)


_OURS = Tokenizer(77)


def test_a_small_vocabulary_stays_inside_its_table_and_ends_with_its_largest_id():
    small = Tokenizer(24, FIXED + 1500)
    ids = small(["a large purple triangle", "an xylophone"])
    assert ids.max() == small.end == FIXED + 1499
    assert (ids[:, 0] == small.start).all()
    assert small.encode("red") == Tokenizer(24).encode("red")


def test_what_does_not_fit_is_told_in_words():
    short = Tokenizer(6)
    assert short.truncated("a red circle") == ""
    assert short.truncated("a large red circle on a white café wall") == "on a white café wall"


def test_impossible_vocabularies_and_contexts_are_refused():
    with pytest.raises(Refused, match="vocabulary of 100"):
        Tokenizer(77, 100)
    with pytest.raises(Refused, match="vocabulary"):
        Tokenizer(77, CLIP_VOCABULARY + 1)
    with pytest.raises(Refused, match="context of 2"):
        Tokenizer(2)
