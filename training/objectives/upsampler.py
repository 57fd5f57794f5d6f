"""What an upsampler learns (arXiv 2204.06125, section 2.1)."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.store import Store
from training.data import Batch, Reads, derive_seed, picture
from training.job import Job
from training.objectives.base import Diffusion, Losses
from training.optim import in_float32
from training.options import UpsamplerTrain
from training.parallel import Group
from unclip.degrade import BSR_FULL, BSR_LIGHT, bsr_degrade, gaussian_blur
from unclip.models import Upsampler
from unclip.pictures import to_unit


class UpsamplerObjective(Diffusion):
    """Pictures given their low-resolution selves, corrupted a little (section 2.1); trained on crops."""

    def __init__(self, job: Job, store: Store, device: torch.device) -> None:
        super().__init__(job, store)
        self.reads = Reads(image=partial(picture, size=self.config.size), originals=True)
        options = cast(UpsamplerTrain, self.options)
        self.bsr = {"bsr": BSR_FULL, "bsr_light": BSR_LIGHT}.get(options.corruption)
        if self.bsr is not None:
            self.bsr = self.bsr.scaled(options.strength)
        self.config.check_crop(options.crop)

    def build(self) -> nn.Module:
        return self.started(Upsampler(self.config))

    def loss(self, model: nn.Module, batch: Batch, group: Group) -> Losses:
        upsampler, options = cast(Upsampler, model), cast(UpsamplerTrain, self.options)
        x0 = to_unit(batch.tensors["image"])
        with in_float32(x0.device):
            low = self._corrupted(F.avg_pool2d(x0, self.config.factor), batch)
        if options.crop is not None and options.crop < self.config.size:
            x0, low = self._cropped(x0, low, options.crop, batch)
        t, noise = self._noise(upsampler.schedule, x0, batch)
        output = upsampler(upsampler.schedule.q_sample(x0, noise, t), t, low)
        return self._loss(upsampler.schedule, output, x0, noise, t)

    def _corrupted(self, low: Tensor, batch: Batch) -> Tensor:
        """The condition as this fit spoils it; under BSR a sample's seed is made of the micro-batch's and its uid."""
        options = cast(UpsamplerTrain, self.options)
        if options.corruption == "blur" and options.blur:
            sigmas = options.blur * torch.rand(len(low), generator=batch.generator)
            return gaussian_blur(low, sigmas.to(low.device))
        if self.bsr is not None:
            return bsr_degrade(low, [derive_seed("bsr", batch.seed, uid.hex()) for uid in batch.uids], self.bsr)
        return low

    def _cropped(self, x0: Tensor, low: Tensor, crop: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same random square of each picture in both resolutions, aligned to low-resolution pixels."""
        factor = self.config.factor
        side = crop // factor
        corners = torch.randint(low.shape[-1] - side + 1, (len(x0), 2), generator=batch.generator).tolist()
        high = [
            x[:, factor * y : factor * y + crop, factor * z : factor * z + crop]
            for x, (y, z) in zip(x0, corners, strict=True)
        ]
        small = [x[:, y : y + side, z : z + side] for x, (y, z) in zip(low, corners, strict=True)]
        return torch.stack(high), torch.stack(small)
