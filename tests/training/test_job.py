from __future__ import annotations

import pytest

from infra.errors import Refused
from training.job import FitHow, Job
from training.options import DecoderTrain, PriorTrain, TrainConfig, UpsamplerTrain


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TrainConfig(steps=0), "train.steps"),
        (lambda: TrainConfig(steps=1, batch=10, micro=3), "train.micro"),
        (lambda: TrainConfig(steps=1, decay="linear"), "train.decay"),
        (lambda: TrainConfig(steps=1, ema=1.0), "train.ema"),
        (lambda: TrainConfig(steps=1, lr=0), "train.lr"),
        (lambda: TrainConfig(steps=1, beta2=1.0), "train.beta2"),
        (lambda: PriorTrain(steps=1, drop_text=1.5), "train.drop_text"),
        (lambda: DecoderTrain(steps=1, drop_image=-1), "train.drop_image"),
        (lambda: UpsamplerTrain(steps=1, crop=0), "train.crop"),
        (lambda: UpsamplerTrain(steps=1, blur=-1), "train.blur"),
        (lambda: PriorTrain(steps=1, t_mean=0.5), "train.t_std"),
        (lambda: TrainConfig(steps=1, muon=-1), "train.muon"),
        (lambda: FitHow(workers=0), "workers"),
        (lambda: Job("s", "k", "vae", {}, {}, {}), "'vae'"),
    ],
)
def test_the_impossible_is_refused_by_name(make, named):
    with pytest.raises(Refused, match=named):
        make()


def test_an_option_of_another_kind_of_model_is_unknown():
    with pytest.raises(Refused, match="crop"):
        _ = Job("prior", "k", "prior", {}, {"steps": 1, "crop": 8}, {}).config


def test_a_batch_is_one_micro_batch_unless_told_otherwise():
    assert (TrainConfig(steps=1, batch=12).lanes, TrainConfig(steps=1, batch=12, micro=3).lanes) == (1, 4)
