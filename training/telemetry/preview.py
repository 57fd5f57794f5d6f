"""What a model draws while it trains: of the same rows, from the same noise, with its averaged weights.

Nothing that is trained is touched: the averages stand in for the weights in calls of their own (`functional_call`), the
model is in evaluation mode for as long, and all noise comes from seeds of its own (`noise_for`).
"""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data import Batch, Data
from training.job import FitHow, Job
from training.objectives import Objective
from training.optim import Precision
from training.parallel import Group
from unclip.clip import Text
from unclip.diffusion import Sampling, clip_denoiser, conditional, guided_denoiser
from unclip.models import Decoder, Prior, Upsampler
from unclip.pictures import to_uint8, to_unit
from unclip.sample import draw, sample_embeddings

if TYPE_CHECKING:
    from training.telemetry.clock import Monitor

NAME = "preview"
PICTURES, EMBEDDINGS = 8, 64
"""Rows that are drawn of, at most; never more than a micro-batch, whose memory there is."""
STEPS, GUIDANCE = 16, 2.0
ALONE = Group()
LEAST_SIDE = 64
"""Pixels of a picture's side that a person sees; smaller ones are enlarged."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shown:
    """What there is to see: pictures uint8 [rows, n, 3, s, s], and figures by name."""

    pictures: Tensor | None = None
    values: dict[str, float] | None = None


class Previews:
    """The previews of one fit, on one rank; each is told to the monitor.

    They take `how.preview_share` of the time at most, whatever one costs: the next comes when so much time has passed
    that it pays for all so far. What the first one costs is guessed: its forward passes at a third of what a sample
    takes to train. data: the rows to draw of, held-out ones where there are such. One that fails, for instance for want
    of memory, is the last: training goes on.
    """

    def __init__(
        self,
        job: Job,
        how: FitHow,
        task: Objective,
        model: nn.Module,
        data: Data,
        monitor: Monitor,
        precision: Precision,
        group: Group = ALONE,
        *,
        sharded: bool = False,
    ) -> None:
        self._job, self._how, self._task, self._model, self._monitor = job, how, task, model, monitor
        self._data, self._precision = data.apart(), precision
        here = group.rank == 0 and not sharded and how.preview_share > 0
        self._draw = _DRAWN.get(job.kind) if here else None
        self._rows = min(EMBEDDINGS if self._draw is _embeddings else PICTURES, job.config.micro_size)
        passes = STEPS * self._rows * (2 if self._draw is _pictures else 1)  # with and without its condition
        self._costs = passes / 3 / (job.config.batch / group.ranks)
        self._batch: Future[Batch] | None = None
        self._steps, self._began, self._spent, self._last = 0, time.monotonic(), 0.0, 0.0

    def due(self) -> bool:
        """Asked after each step: whether there is something to show, and time for it."""
        if self._draw is None:
            return False
        self._steps += 1
        if self._spent:
            return self._spent + self._last <= self._how.preview_share * (time.monotonic() - self._began)
        return self._costs <= self._how.preview_share * self._steps and self._reading().done()

    def show(self, step: int, averaged: dict[str, Tensor]) -> None:
        """Draws with these weights, a state dict of the model."""
        assert self._draw is not None
        began = time.monotonic()
        try:
            self._tell(step, self._drawn(self._draw, self._reading().result(), averaged))
        except Exception as error:  # noqa: BLE001  weeks of training do not end for a picture
            log.warning("%s: no more previews: %s: %s", self._job.stage, type(error).__name__, error)
            self._draw = None
        self._last = time.monotonic() - began
        self._spent += self._last

    def _reading(self) -> Future[Batch]:
        """The rows, read by a thread: training does not wait for a store that does not answer."""
        if self._batch is None:
            self._batch = read = Future[Batch]()

            def fill() -> None:
                torch.set_num_threads(self._how.threads)
                try:
                    read.set_result(self._read())
                except BaseException as error:  # noqa: BLE001 - handed to whoever asks for the rows
                    read.set_exception(error)

            threading.Thread(target=fill, name="preview", daemon=True).start()
        return self._batch

    def _read(self) -> Batch:
        """The first rows there are: the same in every start of the fit, and of all fits on these data."""
        places = ((block, row) for block, count in enumerate(self._data.counts) for row in range(count))
        batch = self._data.batch(list(islice(places, self._rows)), 0).to(next(self._model.parameters()).device)
        self._monitor.artifact(self._job.stage, "\n".join([*batch.captions, ""]).encode(), f"{NAME}/captions.txt")
        return batch

    @torch.no_grad()
    def _drawn(self, show: Draw, batch: Batch, averaged: dict[str, Tensor]) -> Shown:
        under = {f"model.{name}": tensor for name, tensor in averaged.items()}
        self._model.eval()
        try:
            with self._precision.autocast(), _uncompiled(self._how):
                return torch.func.functional_call(_Call(self._model, show), under, (self._task, batch))
        finally:
            self._model.train()

    def _tell(self, step: int, shown: Shown) -> None:
        if shown.values:
            self._monitor.metrics(self._job.stage, step, {f"{NAME}/{name}": v for name, v in shown.values.items()})
        if shown.pictures is not None:
            self._monitor.image(self._job.stage, as_png(shown.pictures), NAME, step)


Draw = Callable[[nn.Module, Objective, Batch], Shown]


class _Call(nn.Module):
    """A call that uses more of a model than its forward pass, as `functional_call` wants one."""

    def __init__(self, model: nn.Module, show: Draw) -> None:
        super().__init__()
        self.model, self.show = model, show

    def forward(self, task: Objective, batch: Batch) -> Shown:
        return self.show(self.model, task, batch)


def _uncompiled(how: FitHow) -> AbstractContextManager[Any]:
    """Sampling has other shapes than training: to compile for it would take minutes."""
    return torch.compiler.set_stance("force_eager") if how.compile else nullcontext()


def _embeddings(model: nn.Module, task: Objective, batch: Batch) -> Shown:
    """Of a prior: the cosine of z_i drawn from a caption to the true z_i, and, since all embeddings of a CLIP are a
    little alike, to the next row's."""
    prior, rows = cast(Prior, model), batch.tensors
    text = Text(rows["text_embedding"], rows["text_states"], rows["text_mask"])
    drawn = sample_embeddings(prior, text, range(len(batch)), _sampling(prior)).float()
    true = rows["image_embedding"]
    pairs = {"cosine": true, "cosine_other": true.roll(1, 0)}
    return Shown(values={name: float(F.cosine_similarity(drawn, other).mean()) for name, other in pairs.items()})


def _pictures(model: nn.Module, task: Any, batch: Batch) -> Shown:
    """Of a decoder: the rows' own pictures, and below them those that it draws from z_i and caption. An inpainter is
    told their left halves."""
    decoder = cast(Decoder, model)
    x0 = to_unit(batch.tensors["image"])
    context = decoder.context(batch.tensors.get("image_embedding"), *task.caption(batch))
    null = decoder.null_context(len(batch))
    if decoder.config.inpaint:
        free = torch.zeros_like(x0[:, :1], dtype=torch.bool)
        free[..., x0.shape[-1] // 2 :] = True
        context, null = (decoder.knowing(one, x0, free) for one in (context, null))
    sampling = _sampling(decoder, GUIDANCE if task.options.drop_text else 1.0)
    denoise = guided_denoiser(decoder.denoise, context, null, sampling, decoder.schedule)
    return Shown(torch.stack([batch.tensors["image"], _sampled(decoder, denoise, sampling, x0)]))


def _enlarged(model: nn.Module, task: Any, batch: Batch) -> Shown:
    """Of an upsampler: small pictures, what it makes of them, and what they were made of; the middle of each, where it
    is trained on crops."""
    upsampler, image = cast(Upsampler, model), batch.tensors["image"]
    side = task.options.crop or upsampler.config.size
    corner = (image.shape[-1] - side) // 2 // upsampler.config.factor * upsampler.config.factor
    image = image[..., corner : corner + side, corner : corner + side]
    x0 = to_unit(image)
    low = F.avg_pool2d(x0, upsampler.config.factor)
    sampling = _sampling(upsampler)
    drawn = _sampled(upsampler, conditional(upsampler.denoise, low), sampling, x0)
    small = to_uint8(low).repeat_interleave(upsampler.config.factor, 2).repeat_interleave(upsampler.config.factor, 3)
    return Shown(torch.stack([small, drawn, image]))


_DRAWN: dict[str, Draw] = {
    "prior": _embeddings,
    "ar_prior": _embeddings,
    "decoder": _pictures,
    "inpainter": _pictures,
    "upsampler": _enlarged,
}


def _sampling(model: Any, guidance: float = 1.0) -> Sampling:
    return Sampling("ddim", steps=min(STEPS, getattr(model.config, "timesteps", STEPS)), guidance=guidance)


def _sampled(model: Decoder | Upsampler, denoise: Any, sampling: Sampling, like: Tensor) -> Tensor:
    """uint8 pictures of the shape of `like`, a seed each."""
    bounded, seeds = clip_denoiser(denoise, sampling, model.schedule), range(len(like))
    x = draw(NAME, bounded, model.schedule, seeds, like.shape[1:], sampling, like.device)
    return to_uint8(x.float().nan_to_num())


def as_png(pictures: Tensor) -> bytes:
    """uint8 [rows, n, 3, s, s] as one picture, row below row."""
    from PIL import Image

    times = max(1, LEAST_SIDE // pictures.shape[-1])
    rows, n, _, side, _ = pictures.shape
    sheet = pictures.permute(0, 3, 1, 4, 2).reshape(rows * side, n * side, 3)
    sheet = sheet.repeat_interleave(times, 0).repeat_interleave(times, 1)
    buffer = io.BytesIO()
    Image.fromarray(sheet.cpu().numpy()).save(buffer, "png")
    return buffer.getvalue()
