"""One model of a cascade drawn as its settings want it: noise by seed, the sampler's steps, what is told meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unclip.clip import Text
from unclip.diffusion import SAMPLERS, Denoiser, Prediction, Sampling, Schedule, guided_denoiser, noise_for
from unclip.errors import Refused
from unclip.models import DiffusionPrior, Prior, sample_tokens
from unclip.progress import Report

Bind = Callable[[Denoiser, str, Sequence[int], Sequence[int]], Denoiser]
"""(denoiser, component, rows of the pictures in this call, their seeds) → denoiser."""


class Manipulation(NamedTuple):
    """What a manipulation changes in the sampling of one tile; see `UnCLIP.decode_image`."""

    start: Tensor | None
    depth: float
    bind: Bind | None
    rows: Sequence[int]
    known: tuple[Tensor, Tensor] | None = None


def draw(
    stream: str,
    denoise: Denoiser,
    schedule: Schedule,
    seeds: Sequence[int],
    shape: Sequence[int],
    sampling: Sampling,
    device: torch.device,
    gamma: Tensor | None = None,
    report: Report | None = None,
    extra: Manipulation | None = None,
) -> Tensor:
    """One sample [len(seeds), *shape] a seed, from the denoiser of a process, by the settings' sampler and steps.

    stream: whose noise it is, the component's name or "component/…". gamma: the release's table for Analytic-DPM.
    """
    component = stream.split("/")[0]
    noise = noise_for(seeds, shape, stream=stream, device=device)
    options = sampling.options(pictures=len(shape) > 1, gamma=gamma)
    steps = schedule.respace(sampling.steps)
    x = noise(0)
    if extra is not None:
        x = x if extra.start is None else extra.start
        steps = last_steps(steps, extra.depth)
        if extra.bind is not None:
            denoise = extra.bind(denoise, stream, extra.rows, seeds)

    def tell(step: int, _x: Tensor, prediction: Prediction) -> None:
        if report is not None:
            report(component, step, len(steps), prediction.x0)

    return SAMPLERS[sampling.sampler](denoise, x, steps, noise=noise, callback=tell, **options)


@torch.no_grad()
def sample_embeddings(
    prior: Prior,
    text: Text,
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    gamma: Tensor | None = None,
    report: Report | None = None,
) -> Tensor:
    """Raw image embeddings z_i [b, d] for texts; of several candidates the one that the text likes best (z_i·z_t)."""
    context: Any = prior.context(*text)
    null: Any = prior.null_context(len(seeds))
    if isinstance(prior, DiffusionPrior):
        # What the captions say is the same at every step, and for every candidate.
        context, null = prior.read(context), prior.read(null)
    found = [
        _candidate(prior, f"prior/{k}", context, null, seeds, sampling, gamma, report)
        for k in range(sampling.candidates)
    ]
    stacked = torch.stack(found)
    best = (stacked * text.embedding).sum(2).argmax(0)
    return stacked[best, torch.arange(len(seeds), device=stacked.device)]


def _candidate(
    prior: Prior,
    stream: str,
    context: Any,
    null: Any,
    seeds: Sequence[int],
    sampling: Sampling,
    gamma: Tensor | None,
    report: Report | None,
) -> Tensor:
    """One [b, d]: by denoising from captions that were read, or token by token, each a step."""
    device = prior.positions.device
    if isinstance(prior, DiffusionPrior):
        denoise = prior.in_range(guided_denoiser(prior.denoise, context, null, sampling, prior.schedule))
        shape = (prior.config.embedding,)
        return prior.destandardise(draw(stream, denoise, prior.schedule, seeds, shape, sampling, device, gamma, report))

    def tell(step: int, tokens: Tensor) -> None:
        if report is not None:
            report("prior", step, prior.config.tokens, prior.embedding(tokens))

    noise = noise_for(seeds, (prior.config.buckets,), stream=stream, device=device)
    settings = {"guidance": sampling.guidance, "temperature": sampling.temperature}
    return prior.embedding(sample_tokens(prior, context, null, noise, callback=tell, **settings))


def in_tiles(count: int, size: int) -> Iterator[list[int]]:
    """Row numbers, `size` at a time; the last tile is filled up with its own last row."""
    for first in range(0, count, size):
        rows = list(range(first, min(first + size, count)))
        yield rows + [rows[-1]] * (size - len(rows))


def last_steps(schedule: Schedule, depth: float) -> Schedule:
    """The less noisy share `depth` of the steps of a process, at least one; depth in (0, 1]."""
    if not 0 < depth <= 1:
        raise Refused(f"the share of the steps to take must lie above 0 and be at most 1, not {depth}")
    return schedule.keep(torch.arange(max(1, round(depth * len(schedule)))))
