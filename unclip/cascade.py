"""The cascade: text → CLIP text → prior → z_i → decoder → upsamplers → pictures (arXiv 2204.06125, section 2).

A decoder that draws from prompts alone stands without a prior: text → decoder → upsamplers → pictures, as GLIDE does.

A picture's noise comes from its own seed, and every call of a network has the same batch shape: what a picture looks
like does not depend on which others are made beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from unclip.clip import Clip, Text, clip_widths
from unclip.diffusion import Network, Sampling, check_sampling, clip_denoiser, conditional, guided_denoiser
from unclip.errors import Refused
from unclip.models import (
    WORKSPACE,
    AutoregressivePrior,
    Caption,
    Decoder,
    Prior,
    Upsampler,
    fold_upsampling,
    pad_to_multiple,
)
from unclip.pictures import to_uint8
from unclip.progress import Callback, Report, Reporter
from unclip.release import Guides, check_fit, check_gamma, check_guides, load_models
from unclip.sample import Bind, Manipulation, draw, in_tiles, sample_embeddings

TILE = 4
"""Pictures a call of a network, by default: larger is faster for many pictures, smaller for an order of a few."""


class UnCLIP:
    """All models of one release, frozen.

    prior: None for a decoder that takes no z_i. sampling: defaults for "prior", "decoder" and each "upsampler-<side>".
    tile: pictures a call of a network, always; a last call is filled up. inpainter: a decoder that was trained to fill
    in, which then draws in the decoder's place and as it is sampled. The same prompt and seed give the same picture
    under the same tile, device and threads.
    guides: what may guide the decoder beside its own condition.
    gamma: a table of γ for each model that Analytic-DPM can sample without one among its settings.
    """

    def __init__(
        self,
        clip: Clip,
        prior: Prior | None,
        decoder: Decoder,
        upsamplers: Sequence[Upsampler],
        sampling: Mapping[str, Sampling] | None = None,
        tile: int = TILE,
        guides: Guides | None = None,
        gamma: Mapping[str, Tensor] | None = None,
        *,
        inpainter: Decoder | None = None,
    ) -> None:
        check_fit(
            clip_widths(clip.config),
            None if prior is None else prior.config,
            decoder.config,
            [upsampler.config for upsampler in upsamplers],
            None if inpainter is None else inpainter.config,
        )
        self.tile, self.gamma, self.guides = tile, dict(gamma or {}), guides or Guides()
        check_guides(decoder.config, clip.embedding_width, {n: m.config for n, m in self.guides.models.items()})
        self.clip, self.prior, self.decoder, self.upsamplers = clip, prior, decoder, list(upsamplers)
        self.inpainter = inpainter
        given = dict(sampling or {})
        if unknown := sorted(set(given) - set(self.components)):
            raise Refused(f"sampling names {', '.join(unknown)}; this cascade has {', '.join(self.components)}")
        processes = {name: getattr(model.config, "timesteps", None) for name, model in self._sampled.items()}
        check_gamma({name: len(table) for name, table in self.gamma.items()}, processes)
        self.sampling = {name: given.get(name, Sampling()) for name in self.components}
        self._check_sampling(self.sampling)
        for model in self._models:
            model.requires_grad_(False).eval()
            fold_upsampling(model)

    @property
    def components(self) -> list[str]:
        """Names of the models that are sampled, in order."""
        return list(self._sampled)

    @property
    def _sampled(self) -> dict[str, Prior | Decoder | Upsampler]:
        first = {} if self.prior is None else {"prior": self.prior}
        return {**first, "decoder": self.decoder, **self.by_side}

    @property
    def by_side(self) -> dict[str, Upsampler]:
        """The upsamplers by name, "upsampler-<side>", in order."""
        return {f"upsampler-{upsampler.config.size}": upsampler for upsampler in self.upsamplers}

    @property
    def _models(self) -> list[nn.Module]:
        """All networks but CLIP."""
        own = (self.prior, self.decoder, self.inpainter, *self.upsamplers, *self.guides.models.values())
        return [model for model in own if model is not None]

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
        models = load_models(folder)
        return cls(**{field.name: getattr(models, field.name) for field in fields(models)})

    def to(self, device: torch.device | str) -> UnCLIP:
        """Moves all models; returns itself."""
        self.clip.to(device)
        for model in self._models:
            model.to(device)
        return self

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        guidance: float | None = None,
        prior_guidance: float | None = None,
        labels: Mapping[str, str] | None = None,
        label_guidance: float | None = None,
        clip_guidance: float | None = None,
        sampling: Mapping[str, Sampling] | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """One picture a prompt: uint8 [n, 3, size, size] on the host, RGB.

        seeds: one a picture, default 0, 1, 2, …; prompt and seed decide the picture. guidance: the decoder's; labels
        (label → class, of every picture) and the scales of its guides: see `Sampling`, whose fields they are.
        sampling: replaces the release's for the components that it names. An empty prompt draws anything; of one that
        is longer than CLIP's context the end is not seen, which a logged warning says. Raises Refused for impossible
        settings, for a guide that this release does not have, and where settings or damaged weights lead to numbers
        that are not finite.
        """
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        if len(seeds) != len(prompts):
            raise Refused(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed a prompt")
        guides = {"labels": labels, "label_guidance": label_guidance, "clip_guidance": clip_guidance}
        chosen = self.settings(sampling, {"guidance": guidance, **guides}, {"guidance": prior_guidance})
        self.clip.tell_cut(prompts)
        tiles = list(in_tiles(len(prompts), self.tile))
        pictures = []
        for tile, rows in enumerate(tiles):
            words, numbers = [prompts[row] for row in rows], [seeds[row] for row in rows]
            report = Reporter(callback, tile, len(tiles))
            text = self.clip.encode_text(words) if self.prior else None
            embedding = self.sample_prior(text, numbers, chosen["prior"], report) if text else None
            shown = self._render(embedding, self.captions(words, text), numbers, chosen, report)
            pictures.append(shown[: len(prompts) - rows[0]])
        return torch.cat(pictures) if pictures else torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8)

    def decode(
        self,
        embeddings: Tensor | None,
        texts: Sequence[str],
        *,
        seeds: Sequence[int],
        start: Tensor | None = None,
        depth: float = 1.0,
        bind: Bind | None = None,
        known: tuple[Tensor, Tensor] | None = None,
        sampling: Mapping[str, Sampling] | None = None,
        guidance: float | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Pictures uint8 [n, 3, size, size] of raw image embeddings [n, d] and a text (may be empty) and a seed each.

        embeddings: None for a decoder that draws from prompts alone.
        start: what the decoder begins with, [n, 3, s, s], instead of the seeds' noise. depth: the share of the
        decoder's steps that is taken, the last ones, above 0 and at most 1; `start` is as noisy as its first step says.
        bind: changes each model's denoiser (given the component's name and the rows of the call), as `manipulate` does
        to keep a part of a picture. known: what the inpainter, which draws then, is told of each base picture, as
        `Decoder.knowing` takes it. The rest as in `generate`.
        """
        given = [part for part in (embeddings, start, *(known or ())) if part is not None]
        if {len(part) for part in given} - {len(texts)} or len(texts) != len(seeds):
            count = len(given[0]) if given else len(texts)
            raise Refused(
                f"{count} pictures with {len(texts)} texts and {len(seeds)} seeds: give one of each a picture"
            )
        if known is not None and self.inpainter is None:
            raise Refused("this release has no inpainter: a decoder that was trained to fill in")
        chosen = self.settings(sampling, {"guidance": guidance})
        self.clip.tell_cut(texts)
        tiles = list(in_tiles(len(texts), self.tile))
        pictures = []
        for tile, rows in enumerate(tiles):
            report = Reporter(callback, tile, len(tiles))
            numbers = [seeds[row] for row in rows]
            begin, z = (None if part is None else part[rows].to(self.device) for part in (start, embeddings))
            told = None if known is None else (known[0][rows].to(self.device), known[1][rows].to(self.device))
            extra = Manipulation(begin, depth, bind, rows, told)
            shown = self._render(z, self.captions([texts[row] for row in rows]), numbers, chosen, report, extra)
            pictures.append(shown[: len(texts) - rows[0]])
        return torch.cat(pictures) if pictures else torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8)

    def captions(self, texts: Sequence[str], read: Text | None = None) -> Caption:
        """Texts as the decoder takes them; read: what CLIP says of them, where it is known already."""
        if self.decoder.config.text == "own":
            return (self.clip.tokenize(texts).to(self.device),)
        return read or self.clip.encode_text(texts)

    def _render(
        self,
        embedding: Tensor | None,
        caption: Caption,
        seeds: Sequence[int],
        chosen: Mapping[str, Sampling],
        report: Report,
        extra: Manipulation | None = None,
    ) -> Tensor:
        """Decoder and upsamplers, one tile: uint8 on the host."""
        x = self.sample_decoder(embedding, caption, seeds, chosen["decoder"], report, extra)
        for name, upsampler in self.by_side.items():
            x = self.sample_upsampler(upsampler, x, seeds, chosen[name], report, extra)
        if not bool(x.isfinite().all()):  # which 8 bits would show as black
            raise Refused("these pictures are not finite numbers: the guidance is far too large, or a model is damaged")
        return to_uint8(x).cpu()

    @torch.no_grad()
    def sample_prior(
        self, text: Text, seeds: Sequence[int], sampling: Sampling, callback: Report | None = None
    ) -> Tensor:
        """Raw image embeddings z_i [b, d] for texts; of several candidates the one that the text likes best.

        Raises Refused where there is no prior.
        """
        if self.prior is None:
            raise Refused("this release has no prior: its decoder draws from prompts alone")
        return sample_embeddings(self.prior, text, seeds, sampling, gamma=self.gamma.get("prior"), report=callback)

    @torch.no_grad()
    def sample_decoder(
        self,
        embedding: Tensor | None,
        caption: Caption,
        seeds: Sequence[int],
        sampling: Sampling,
        callback: Report | None = None,
        extra: Manipulation | None = None,
    ) -> Tensor:
        """Base pictures [b, 3, s, s] in [-1, 1] for raw image embeddings [b, d], if the decoder takes them, and
        `captions`."""
        known = extra.known if extra is not None else None
        decoder = self.inpainter if known is not None and self.inpainter is not None else self.decoder
        side = decoder.config.size
        context, null = decoder.context(embedding, *caption), decoder.null_context(len(seeds))
        if known is not None:
            context, null = decoder.knowing(context, *known), decoder.knowing(null, *known)
        denoise = guided_denoiser(decoder.denoise, context, null, sampling, decoder.schedule)
        # z_t: the caption's first part, or what CLIP makes of the same tokens.
        text = self.clip.text(*caption).embedding if len(caption) == 1 and sampling.clip_guidance else caption[0]
        denoise = self.guides.guide(denoise, text, sampling, decoder.schedule)
        denoise = clip_denoiser(denoise, sampling, decoder.schedule)
        gamma = self.gamma.get("decoder")
        return draw(
            "decoder", denoise, decoder.schedule, seeds, (3, side, side), sampling, self.device, gamma, callback, extra
        )

    @torch.no_grad()
    def sample_upsampler(
        self,
        upsampler: Upsampler,
        low: Tensor,
        seeds: Sequence[int],
        sampling: Sampling,
        callback: Report | None = None,
        extra: Manipulation | None = None,
        *,
        workspace: int = WORKSPACE,
        hold: torch.device | str | None = None,
    ) -> Tensor:
        """Pictures [b, 3, f·h, f·w] in [-1, 1] for pictures [b, 3, h, w] in [-1, 1], of any h and w.

        Sides that the U-Net cannot halve are mirrored beyond their edge, and cut again. Where the widest layer of the
        batch takes more than `workspace` bytes, it runs picture by picture and in strips: the same pictures up to
        rounding, in less memory. hold: where whole layers lie then (see `unclip.models.strips.in_strips`).
        """
        config = upsampler.config
        height, width = (side * config.factor for side in low.shape[2:])
        low = pad_to_multiple(low, config.grain)
        shape = (3, *(side * config.factor for side in low.shape[2:]))
        network: Network = upsampler.denoise
        if upsampler.widest(len(low), *shape[1:]) > workspace:
            network = partial(upsampler.denoise_in_strips, workspace=workspace, hold=hold)

        def report(component: str, step: int, steps: int, x0: Tensor) -> None:
            if callback is not None:
                callback(component, step, steps, x0[:, :, :height, :width])

        denoise = clip_denoiser(conditional(network, low), sampling, upsampler.schedule)
        extra = extra and extra._replace(start=None, depth=1.0)
        name = f"upsampler-{config.size}"
        gamma = self.gamma.get(name)
        x = draw(name, denoise, upsampler.schedule, seeds, shape, sampling, self.device, gamma, report, extra)
        return x[:, :, :height, :width]

    def settings(
        self,
        sampling: Mapping[str, Sampling] | None = None,
        decoder: Mapping[str, Any] = MappingProxyType({}),
        prior: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, Sampling]:
        """The settings of each component: the release's, replaced by `sampling` for those that it names.

        decoder, prior: fields of theirs to replace, those that are not None. Raises Refused for impossible settings.
        """
        if unknown := sorted(set(sampling or {}) - set(self.components)):
            raise Refused(f"sampling names {', '.join(unknown)}; this release has {', '.join(self.components)}")
        chosen = self.sampling | dict(sampling or {})
        for name, changes in (("decoder", decoder), ("prior", prior)):
            said = {field: value for field, value in changes.items() if value is not None}
            if said and name not in chosen:
                raise Refused(f"this release has no {name} to guide: its decoder draws from prompts alone")
            chosen |= {name: replace(chosen[name], **said)} if said else {}
        self._check_sampling(chosen)
        return chosen

    def _check_sampling(self, sampling: Mapping[str, Sampling]) -> None:
        """Raises Refused for a setting that its model has no use for."""
        for name, settings in sampling.items():
            model = self._sampled[name]
            written = isinstance(model, AutoregressivePrior)
            check_sampling(name, settings, written=written, gamma=name in self.gamma)
            if not isinstance(model, AutoregressivePrior) and settings.steps > model.config.timesteps:
                raise Refused(f"{name} has {model.config.timesteps} timesteps, and cannot take {settings.steps} steps")
        self.guides.check(sampling["decoder"])
