"""Measures a trained prior's γ, which gives Analytic-DPM its variances; only where the recipe samples it that way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import Refused
from infra.records import Action, Manifest, Record
from infra.store import Store
from pipelines.stage import PoolHow, StageBase

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from training.data import Data
    from unclip.diffusion import Denoiser, Sampling
    from unclip.models import DiffusionPrior

WINDOW = 4
"""Blocks among whose rows the samples are drawn; as many are held in memory."""


def wants_gamma(prior: Sampling) -> bool:
    """Whether these settings of a diffusion prior ask for a table that they do not bring."""
    return prior.takes_gamma and not prior.gamma


@dataclass(frozen=True)
class GammaSpec:
    """Over how many rows γ is a mean. It is one over the embedding's dimensions too, so few suffice."""

    samples: int = 256
    """Training rows, drawn at random; each is noised to every timestep."""
    batch: int = 64
    """Rows that the prior sees at a time."""
    seed: int = 0
    """Of the choice of rows and of the noise."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.samples < 1 or self.samples % self.batch:
            raise Refused(f"gamma: {self.samples} samples are no whole number of batches of {self.batch}")


@dataclass(frozen=True)
class Gamma(StageBase):
    """Stage: the prior over rows of its training data → `gamma.safetensors`, which joins it in the release."""

    spec: GammaSpec = field(default_factory=GammaSpec)
    how: PoolHow = field(default_factory=PoolHow)
    name = group = "gamma"
    needs = ("prior", "clip", "embed", "curate")
    kind = "actor"

    @classmethod
    def beside(cls, fit: Any) -> Gamma:
        """The stage with what a worker of that fit may use (FitHow's threads, cpus and gpus)."""
        return cls(how=PoolHow(actors=1, threads=fit.threads, cpus=fit.cpus, gpus=fit.gpus))

    def setup(self) -> None:
        """Sets the number of threads."""
        import torch

        torch.set_num_threads(self.how.threads)

    def run(self, action: Action, store: Store, out: Path) -> Record:
        from infra.records import materialise
        from pipelines.embed import load_clip
        from training.data import Data, Reads
        from training.objectives import read_text
        from unclip.diffusion import estimate_gamma
        from unclip.release import load_model, save_gamma

        prior_version, clip, rows, selection = action.inputs
        device = "cuda" if self.how.gpus else "cpu"
        with store.scratch() as folder:
            materialise(store, Manifest.load(store, prior_version, "prior").only, folder / "prior")
            prior: Any = load_model(folder / "prior", "prior").to(device)
        reads, texts = Reads(embeddings=True, text=True), partial(read_text, load_clip(store, clip, device))
        data = Data(store, rows, selection, reads, read_text=texts, cache=1 << 28)
        gamma = estimate_gamma(batches(prior, data, self.spec), prior.schedule, seed=self.spec.seed)
        save_gamma(out, gamma)
        return Record.of(action, out, facts={"samples": self.spec.samples})


def batches(prior: DiffusionPrior, data: Data, spec: GammaSpec) -> Iterator[tuple[Denoiser, Tensor]]:
    """(denoiser under a batch's captions, standardised z_i [batch, d]): the prior as it is sampled, but unguided."""
    from training.data import Order
    from unclip.diffusion import conditional

    device: torch.device = prior.mean.device
    order = Order(data.counts, 1, spec.batch, WINDOW, spec.seed)
    for step in range(spec.samples // spec.batch):
        rows = data.batch(order.rows(step, 0), spec.seed).to(device).tensors
        # Read once, as in sampling: every timestep sees the same captions.
        context = prior.read(prior.context(rows["text_embedding"], rows["text_states"], rows["text_mask"]))
        yield prior.in_range(conditional(prior.denoise, context)), prior.standardise(rows["image_embedding"])
