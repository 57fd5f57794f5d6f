"""The cascade: text → CLIP text → prior → z_i → decoder → upsamplers → pictures (arXiv 2204.06125, section 2).

A picture's noise comes from its own seed, and every call of a network has the same batch shape: what a picture looks
like does not depend on which others are made beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from unclip.ar_prior import AutoregressivePrior, write_tokens
from unclip.clip import Clip
from unclip.clip_text import Text
from unclip.decoder import Decoder
from unclip.errors import Refused
from unclip.fit import check_fit
from unclip.guidance import Network, clipped, conditional
from unclip.prior import DiffusionPrior, PriorContext
from unclip.progress import Callback, Report, Reporter
from unclip.samplers import SAMPLERS, noise_for
from unclip.sampling import Sampling, check_sampling, guided, in_range
from unclip.schedule import Denoiser, Prediction, Schedule
from unclip.upsampler import WORKSPACE, Upsampler, filled_up

Prior = DiffusionPrior | AutoregressivePrior

TILE = 4
"""Pictures a call of a network, by default: larger is faster for many pictures, smaller for an order of a few."""


class UnCLIP:
    """All models of one release, frozen.

    sampling: defaults for "prior", "decoder" and each "upsampler-<side>". tile: pictures a call of a network, always; a
    last call is filled up. The same prompt and seed give the same picture under the same tile, device and threads.
    """

    def __init__(
        self,
        clip: Clip,
        prior: Prior,
        decoder: Decoder,
        upsamplers: Sequence[Upsampler],
        sampling: Mapping[str, Sampling] | None = None,
        tile: int = TILE,
    ) -> None:
        widths = {"embedding": clip.embedding_width, "text_width": clip.text_width, "context": clip.context_length}
        check_fit(widths, prior.config, decoder.config, [upsampler.config for upsampler in upsamplers])
        self.tile = tile
        self.clip, self.prior, self.decoder, self.upsamplers = clip, prior, decoder, list(upsamplers)
        given = dict(sampling or {})
        if unknown := sorted(set(given) - set(self.components)):
            raise Refused(f"sampling names {', '.join(unknown)}; this cascade has {', '.join(self.components)}")
        self.sampling = {name: given.get(name, Sampling()) for name in self.components}
        self._check_sampling(self.sampling)
        for model in (prior, decoder, *upsamplers):
            model.requires_grad_(False).eval()

    @property
    def components(self) -> list[str]:
        """Names of the models that are sampled, in order."""
        return ["prior", "decoder", *(f"upsampler-{upsampler.config.size}" for upsampler in self.upsamplers)]

    @property
    def size(self) -> int:
        """Side of the pictures, in pixels."""
        return (self.upsamplers[-1] if self.upsamplers else self.decoder).config.size

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.clip.device

    @classmethod
    def load(cls, folder: Path | str) -> UnCLIP:
        """Reads a release folder; raises Refused where it is damaged, incomplete or does not fit together."""
        from unclip import release

        return release.load(Path(folder))

    def to(self, device: torch.device | str) -> UnCLIP:
        """Moves all models; returns itself."""
        self.clip.to(device)
        for model in (self.prior, self.decoder, *self.upsamplers):
            model.to(device)
        return self

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        guidance: float | None = None,
        prior_guidance: float | None = None,
        sampling: Mapping[str, Sampling] | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """One picture a prompt: uint8 [n, 3, size, size] on the host, RGB.

        seeds: one a picture, default 0, 1, 2, …; prompt and seed decide the picture. guidance: the decoder's.
        sampling: replaces the release's for the components that it names. Raises Refused for impossible settings.
        """
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        if len(seeds) != len(prompts):
            raise Refused(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed a prompt")
        chosen = self._chosen(sampling, guidance, prior_guidance)
        tiles = list(_tiles(len(prompts), self.tile))
        pictures = []
        for tile, rows in enumerate(tiles):
            words, numbers = [prompts[row] for row in rows], [seeds[row] for row in rows]
            report = Reporter(callback, tile, len(tiles))
            text = self.clip.encode_text(words)
            embedding = self.sample_prior(text, numbers, chosen["prior"], report)
            pictures.append(self._render(embedding, text, numbers, chosen, report)[: len(prompts) - rows[0]])
        return torch.cat(pictures) if pictures else torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8)

    def decode(
        self,
        embeddings: Tensor,
        texts: Sequence[str],
        *,
        seeds: Sequence[int],
        start: Tensor | None = None,
        depth: float = 1.0,
        bind: Bind | None = None,
        sampling: Mapping[str, Sampling] | None = None,
        guidance: float | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Pictures uint8 [n, 3, size, size] of raw image embeddings [n, d] and a text (may be empty) and a seed each.

        start: what the decoder begins with, [n, 3, s, s], instead of the seeds' noise. depth: the share of the
        decoder's steps that is taken, the last ones, above 0 and at most 1; `start` is as noisy as its first step says.
        bind: changes each model's denoiser (given the component's name and the rows of the call), as `manipulate` does
        to keep a part of a picture. The rest as in `generate`.
        """
        if not len(embeddings) == len(texts) == len(seeds) == (len(seeds) if start is None else len(start)):
            raise Refused(
                f"{len(embeddings)} pictures with {len(texts)} texts and {len(seeds)} seeds: give one of each a picture"
            )
        chosen = self._chosen(sampling, guidance, None)
        tiles = list(_tiles(len(texts), self.tile))
        pictures = []
        for tile, rows in enumerate(tiles):
            report = Reporter(callback, tile, len(tiles))
            text, numbers = self.clip.encode_text([texts[row] for row in rows]), [seeds[row] for row in rows]
            extra = _Extra(None if start is None else start[rows].to(self.device), depth, bind, rows)
            shown = self._render(embeddings[rows].to(self.device), text, numbers, chosen, report, extra)
            pictures.append(shown[: len(texts) - rows[0]])
        return torch.cat(pictures) if pictures else torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8)

    def _render(
        self,
        embedding: Tensor,
        text: Text,
        seeds: Sequence[int],
        chosen: Mapping[str, Sampling],
        report: Report,
        extra: _Extra | None = None,
    ) -> Tensor:
        """Decoder and upsamplers, one tile: uint8 on the host."""
        x = self.sample_decoder(embedding, text, seeds, chosen["decoder"], report, extra)
        for name, upsampler in zip(self.components[2:], self.upsamplers, strict=True):
            x = self.sample_upsampler(upsampler, x, seeds, chosen[name], report, extra)
        return to_uint8(x).cpu()

    @torch.no_grad()
    def sample_prior(
        self, text: Text, seeds: Sequence[int], sampling: Sampling, callback: Report | None = None
    ) -> Tensor:
        """Raw image embeddings z_i [b, d] for texts; of several candidates the one that the text likes best."""
        context, null = self.prior.context(*text), self.prior.null_context(len(seeds))
        found = [
            self._draw_prior(f"prior/{k}", context, null, seeds, sampling, callback) for k in range(sampling.candidates)
        ]
        stacked = torch.stack(found)
        best = (stacked * text.embedding).sum(2).argmax(0)
        return stacked[best, torch.arange(len(seeds), device=stacked.device)]

    def _draw_prior(
        self,
        stream: str,
        context: PriorContext,
        null: PriorContext,
        seeds: Sequence[int],
        sampling: Sampling,
        callback: Report | None,
    ) -> Tensor:
        """One candidate [b, d]: by denoising, or token by token, of which each counts as a step."""
        prior = self.prior
        if isinstance(prior, DiffusionPrior):
            denoise = guided(prior.denoise, context, null, sampling, prior.schedule)
            if prior.config.clip_range is not None:
                denoise = clipped(denoise, prior.schedule, -prior.config.clip_range, prior.config.clip_range)
            z = self._sample(stream, denoise, prior.schedule, seeds, (prior.config.embedding,), sampling, callback)
            return prior.destandardise(z)

        def report(step: int, tokens: Tensor) -> None:
            if callback is not None:
                callback("prior", step, prior.config.tokens, prior.embedding(tokens))

        noise = noise_for(seeds, (prior.config.buckets,), stream=stream, device=self.device)
        settings = {"guidance": sampling.guidance, "temperature": sampling.temperature}
        return prior.embedding(write_tokens(prior, context, null, noise, callback=report, **settings))

    @torch.no_grad()
    def sample_decoder(
        self,
        embedding: Tensor,
        text: Text,
        seeds: Sequence[int],
        sampling: Sampling,
        callback: Report | None = None,
        extra: _Extra | None = None,
    ) -> Tensor:
        """Base pictures [b, 3, s, s] in [-1, 1] for raw image embeddings [b, d] and texts."""
        decoder, side = self.decoder, self.decoder.config.size
        context, null = decoder.context(embedding, *text), decoder.null_context(len(seeds))
        denoise = in_range(
            guided(decoder.denoise, context, null, sampling, decoder.schedule), sampling, decoder.schedule
        )
        return self._sample("decoder", denoise, decoder.schedule, seeds, (3, side, side), sampling, callback, extra)

    @torch.no_grad()
    def sample_upsampler(
        self,
        upsampler: Upsampler,
        low: Tensor,
        seeds: Sequence[int],
        sampling: Sampling,
        callback: Report | None = None,
        extra: _Extra | None = None,
        *,
        workspace: int = WORKSPACE,
        hold: torch.device | str | None = None,
    ) -> Tensor:
        """Pictures [b, 3, f·h, f·w] in [-1, 1] for pictures [b, 3, h, w] in [-1, 1], of any h and w.

        Sides that the U-Net cannot halve are mirrored beyond their edge, and cut again. Where the widest layer of the
        batch takes more than `workspace` bytes, it runs picture by picture and in strips: the same pictures up to
        rounding, in less memory. hold: where whole layers lie then (see `unclip.strips.in_strips`).
        """
        config = upsampler.config
        height, width = (side * config.factor for side in low.shape[2:])
        low = filled_up(low, config.grain)
        shape = (3, *(side * config.factor for side in low.shape[2:]))
        network: Network = upsampler.denoise
        if upsampler.widest(len(low), *shape[1:]) > workspace:
            network = partial(upsampler.denoise_in_strips, workspace=workspace, hold=hold)

        def report(component: str, step: int, steps: int, x0: Tensor) -> None:
            if callback is not None:
                callback(component, step, steps, x0[:, :, :height, :width])

        denoise = in_range(conditional(network, low), sampling, upsampler.schedule)
        extra = extra and extra._replace(start=None, depth=1.0)
        name = f"upsampler-{config.size}"
        x = self._sample(name, denoise, upsampler.schedule, seeds, shape, sampling, report, extra)
        return x[:, :, :height, :width]

    def _sample(
        self,
        stream: str,
        denoise: Denoiser,
        schedule: Schedule,
        seeds: Sequence[int],
        shape: Sequence[int],
        sampling: Sampling,
        callback: Report | None,
        extra: _Extra | None = None,
    ) -> Tensor:
        noise = noise_for(seeds, shape, stream=stream, device=self.device)
        options = sampling.options(pictures=len(shape) > 1)
        steps = schedule.respace(sampling.steps)
        x = noise(0)
        if extra is not None:
            x = x if extra.start is None else extra.start
            steps = last_steps(steps, extra.depth)
            if extra.bind is not None:
                denoise = extra.bind(denoise, stream, extra.rows, seeds)

        def report(step: int, _x: Tensor, prediction: Prediction) -> None:
            if callback is not None:
                callback(stream.split("/")[0], step, len(steps), prediction.x0)

        return SAMPLERS[sampling.sampler](denoise, x, steps, noise=noise, callback=report, **options)

    def _chosen(
        self, sampling: Mapping[str, Sampling] | None, guidance: float | None, prior_guidance: float | None
    ) -> dict[str, Sampling]:
        if unknown := sorted(set(sampling or {}) - set(self.components)):
            raise Refused(f"sampling names {', '.join(unknown)}; this release has {', '.join(self.components)}")
        chosen = self.sampling | dict(sampling or {})
        for name, scale in (("decoder", guidance), ("prior", prior_guidance)):
            if scale is not None:
                chosen[name] = replace(chosen[name], guidance=scale)
        self._check_sampling(chosen)
        return chosen

    def _check_sampling(self, sampling: Mapping[str, Sampling]) -> None:
        """Raises Refused for a setting that its model has no use for."""
        for name, settings in sampling.items():
            check_sampling(name, settings, written=name == "prior" and isinstance(self.prior, AutoregressivePrior))


def last_steps(schedule: Schedule, depth: float) -> Schedule:
    """The less noisy share `depth` of the steps of a process, at least one; depth in (0, 1]."""
    if not 0 < depth <= 1:
        raise Refused(f"the share of the steps to take must lie above 0 and be at most 1, not {depth}")
    return schedule.keep(torch.arange(max(1, round(depth * len(schedule)))))


Bind = Callable[[Denoiser, str, Sequence[int], Sequence[int]], Denoiser]
"""(denoiser, component, rows of the pictures in this call, their seeds) → denoiser."""


class _Extra(NamedTuple):
    """What a manipulation changes in the sampling of one tile; see `UnCLIP.decode`."""

    start: Tensor | None
    depth: float
    bind: Bind | None
    rows: Sequence[int]


def _tiles(count: int, size: int) -> Iterator[list[int]]:
    """Row numbers, `size` at a time; the last tile is filled up with its own last row."""
    for first in range(0, count, size):
        rows = list(range(first, min(first + size, count)))
        yield rows + [rows[-1]] * (size - len(rows))


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] → uint8, rounded to the nearest."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
