"""How each kind of model is trained: what a recipe says under `train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from infra.errors import Refused
from unclip.config import AMOUNT, COUNT, FRACTION, LATER, POSITIVE, SEED, SHARE, SIDE, WEIGHTINGS, WHOLE, Range, outside

DECAYS = ("cosine", "constant")


PRECISIONS = ("float32", "bfloat16", "float16")


CORRUPTIONS = ("blur", "bsr_light", "bsr", "none")


LOGIT = Range(-100, 100)


@dataclass(frozen=True)
class TrainConfig:
    """What every objective needs. All of it may change a byte of the weights."""

    steps: int
    """Optimiser steps; one step sees `batch` samples."""
    batch: int = 64
    """Samples a step, over all workers."""
    micro: int | None = None
    """Samples of a micro-batch, the unit of order, randomness and distribution; divides `batch`, its default."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    decay: str = "cosine"
    """After the warm-up: `cosine` down to 0 at the last step, or `constant`."""
    muon: float = 0.0
    """Peak learning rate of Muon for the matrices and convolutions inside; 0: AdamW trains them too."""
    weight_decay: float = 0.0
    """Decoupled weight decay; vectors (biases, norms) are spared."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.999
    """AdamW's decay of the second moment."""
    eps: float = 1e-8
    """AdamW's ε."""
    clip_norm: float = 1.0
    """The gradient is scaled down to this norm; 0 leaves it as it is."""
    ema: float = 0.999
    """Decay a step of the exponential moving average of the weights, which is what is released."""
    ema_ramp: float = 0.1
    """The average reaches back over at most this fraction of the steps done, so that a short run forgets its start."""
    window: int = 16
    """Blocks whose rows are shuffled together."""
    seed: int = 0
    """Seed of the weights, the order and all noise."""
    precision: str = field(default="float32", metadata=LATER)
    """What convolutions and matrix products are computed in: `float32`, or by autocast `bfloat16` or `float16`, whose
    loss is scaled. Weights, moments and averages stay float32."""
    ema_lengths: tuple[float, ...] = field(default=(), metadata=LATER)
    """Release an average of one of these relative lengths σ_rel (0.01–0.28, fractions of the whole training;
    arXiv 2312.02696) in place of `ema`'s: of several, the one whose loss on held-out rows is least."""
    ema_snapshots: int = field(default=32, metadata=LATER)
    """Snapshots that `ema_lengths` are reconstructed from, over the run; each holds two copies of the weights."""
    ema_validation: int = field(default=512, metadata=LATER)
    """Rows, about, that are held out of training to choose among several `ema_lengths`."""
    spike: float = field(default=0.0, metadata=LATER)
    """A step is skipped whose loss or gradient norm lies, in the logarithm, this many deviations above the last 128's
    median (6 to 10 is usual); 0: only a gradient that is not finite is skipped."""
    rollback_after: int = field(default=10, metadata=LATER)
    """Bad steps in a row after which, under `spike`, training returns to an earlier state, and goes on with new
    samples."""
    rollback_every: int = field(default=1000, metadata=LATER)
    """Steps between the states that it may return to; each is a checkpoint."""
    spread: bool = field(default=False, metadata=LATER)
    """Neighbours come from different blocks (data/order.py); without it one in `window` comes from the same."""

    def __post_init__(self) -> None:
        names = ("steps", "batch", "micro", "window", "ema_snapshots", "ema_validation")
        counts = dict.fromkeys((*names, "rollback_after", "rollback_every"), COUNT)
        decays = dict.fromkeys(("beta1", "beta2", "ema"), SHARE) | {"ema_ramp": Range(0, 1, above=True)}
        positive = dict.fromkeys(("lr", "eps"), POSITIVE)
        amounts = dict.fromkeys(("muon", "weight_decay", "clip_norm", "spike"), AMOUNT)
        object.__setattr__(self, "ema_lengths", tuple(self.ema_lengths))  # out of JSON it comes as a list
        lengths = {"ema_lengths": Range(0.01, 0.28)}
        _check(self, **counts, **decays, **positive, **amounts, **lengths, warmup=WHOLE, seed=SEED)
        if self.micro is not None and self.batch % self.micro:
            raise Refused(f"train.micro is {self.micro}, which does not divide train.batch ({self.batch})")
        if self.decay not in DECAYS:
            raise Refused(f"train.decay is {self.decay!r}; use one of {', '.join(DECAYS)}")
        if self.precision not in PRECISIONS:
            raise Refused(f"train.precision is {self.precision!r}; use one of {', '.join(PRECISIONS)}")

    @property
    def micro_size(self) -> int:
        """Samples of a micro-batch."""
        return self.micro or self.batch

    @property
    def lanes(self) -> int:
        """Micro-batches of a batch."""
        return self.batch // self.micro_size


@dataclass(frozen=True)
class NoisedTrain(TrainConfig):
    """What all models share that see noised samples."""

    t_mean: float = 0.0
    """Timesteps are drawn from a logistic normal over (0, 1): mean of its logit; above 0 the noisy half prevails."""
    t_std: float = 0.0
    """Deviation of that logit; 0: timesteps are drawn uniformly."""
    bfloat16_convolutions: bool = False
    """Convolutions multiply in bfloat16 (weights and the rest stay float32); on CPUs that have units for it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, t_mean=LOGIT, t_std=AMOUNT)
        if self.t_mean and not self.t_std:
            raise Refused(f"train.t_std is {self.t_std}; it must be positive for a train.t_mean of {self.t_mean}")
        if self.bfloat16_convolutions and self.precision != "float32":
            raise Refused(f"train.bfloat16_convolutions is for float32; train.precision is {self.precision}")


@dataclass(frozen=True)
class DiffusionTrain(NoisedTrain):
    """What the three diffusion models share."""

    weighting: str = "uniform"
    """Weight of the squared error over t: uniform, min_snr or min_snr_plus_one (unclip/diffusion/losses.py)."""
    snr_cap: float = 5.0
    """The cap of the last two."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weighting not in WEIGHTINGS:
            raise Refused(f"train.weighting is {self.weighting!r}; use one of {', '.join(WEIGHTINGS)}")
        _check(self, snr_cap=POSITIVE)


@dataclass(frozen=True)
class PriorTrain(DiffusionTrain):
    """Options of the diffusion prior."""

    drop_text: float = 0.1
    """Fraction of samples whose caption is replaced by the empty one, for guidance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, drop_text=FRACTION)


@dataclass(frozen=True)
class AutoregressivePriorTrain(TrainConfig):
    """Options of the autoregressive prior."""

    drop_text: float = 0.1
    """Fraction of samples whose caption is replaced by the empty one, for guidance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, drop_text=FRACTION)


@dataclass(frozen=True)
class DecoderTrain(DiffusionTrain):
    """Options of the decoder (section 2.1: 10 % and 50 %)."""

    drop_image: float = 0.1
    """Fraction of samples whose CLIP image embedding is dropped."""
    drop_text: float = 0.5
    """Fraction of samples whose caption is dropped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, drop_image=FRACTION, drop_text=FRACTION)


@dataclass(frozen=True)
class InpainterTrain(DecoderTrain):
    """Options of a decoder's training to fill in (GLIDE, section 2.4)."""

    drop_known: float = 0.1
    """Fraction of samples of which nothing is known, so that it still draws whole pictures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, drop_known=FRACTION)


@dataclass(frozen=True)
class UpsamplerTrain(DiffusionTrain):
    """Options of an upsampler."""

    crop: int | None = None
    """Side of the square that is trained on, in pixels of the output; default the whole picture."""
    blur: float = 0.6
    """Largest σ, in low-resolution pixels, of the Gaussian blur (k = 3) of the condition; each sample draws its own."""
    corruption: str = field(default="blur", metadata=LATER)
    """What spoils the condition: `blur` (the paper's choice for 64→256), `bsr` (BSRGAN's degradation, the paper's for
    256→1024), `bsr_light` (latent diffusion's weaker ranges of it) or `none`."""
    strength: float = field(default=1.0, metadata=LATER)
    """Factor of the deviations that `bsr` and `bsr_light` draw; 0 spoils nothing (unclip/degrade/bsr.py)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, crop=SIDE, blur=AMOUNT, strength=AMOUNT)
        if self.corruption not in CORRUPTIONS:
            raise Refused(f"train.corruption is {self.corruption!r}; use one of {', '.join(CORRUPTIONS)}")
        if self.strength != 1 and not self.corruption.startswith("bsr"):
            raise Refused("train.strength is an option of bsr and bsr_light; the strength of a blur is train.blur")


@dataclass(frozen=True)
class ClipTrain(TrainConfig):
    """Options of CLIP's contrastive training."""

    max_scale: float = 100.0
    """Upper bound of the learned inverse temperature."""
    noised: float = field(default=0.0, metadata=LATER)
    """Share of the pictures that are noised first, to a random timestep of the cosine schedule, so that this CLIP's
    embeddings mean something of unfinished pictures too. It is not told t: for CLIP guidance prefer `noised_clip`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, max_scale=Range(1), noised=FRACTION)


@dataclass(frozen=True)
class ClassifierTrain(NoisedTrain):
    """Options of a noised classifier."""


@dataclass(frozen=True)
class NoisedClipTrain(NoisedTrain):
    """Options of a noised CLIP's contrastive training."""


@dataclass(frozen=True)
class Kind:
    """How one kind of model is trained. Functions and classes are named "module:name" and imported when a fit asks for
    them: whoever reads a recipe imports no network."""

    options: type[TrainConfig]
    """What a recipe says under `train`."""
    objective: str
    """A class that takes (job, store, device): see `training.objectives.base.Objective`."""
    forward: str
    """A function that takes (network, crop, given) and makes one forward pass, from which `training.cost` counts."""
    whole_batch: bool = False
    """Whether its loss compares all samples of a batch: then a worker holds all of its own at once."""
    from_kinds: tuple[str, ...] = ()
    """Kinds beside its own that it may go on from; a release has them under these names."""


KINDS: dict[str, Kind] = {
    "clip": Kind(ClipTrain, "training.objectives.clip:ClipObjective", "training.cost:pass_clip", whole_batch=True),
    "prior": Kind(PriorTrain, "training.objectives.prior:PriorObjective", "training.cost:pass_prior"),
    "ar_prior": Kind(
        AutoregressivePriorTrain,
        "training.objectives.prior:AutoregressivePriorObjective",
        "training.cost:pass_ar_prior",
    ),
    "decoder": Kind(DecoderTrain, "training.objectives.decoder:DecoderObjective", "training.cost:pass_decoder"),
    "inpainter": Kind(
        InpainterTrain,
        "training.objectives.decoder:InpainterObjective",
        "training.cost:pass_decoder",
        from_kinds=("decoder",),
    ),
    "upsampler": Kind(
        UpsamplerTrain, "training.objectives.upsampler:UpsamplerObjective", "training.cost:pass_upsampler"
    ),
    "classifier": Kind(
        ClassifierTrain, "training.objectives.classifier:ClassifierObjective", "training.cost:pass_encoder"
    ),
    "noised_clip": Kind(
        NoisedClipTrain,
        "training.objectives.clip:NoisedClipObjective",
        "training.cost:pass_encoder",
        whole_batch=True,
    ),
}
"""Every kind of model that can be trained. `unclip.release.model.KINDS` and `pipelines.recipe.kinds.KINDS` have a row
for each too."""


def named(path: str) -> Any:
    """What "module:name" names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _check(config: TrainConfig, **ranges: Range) -> None:
    if wrong := outside(config, **ranges):
        raise Refused(f"train.{wrong}")
