from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from tests.training.tiny import CLIP
from training.cost import parameters
from unclip.ar_prior import AutoregressivePrior
from unclip.errors import Refused
from unclip.presets import PAPER, TINY
from unclip.prior import DiffusionPrior


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
