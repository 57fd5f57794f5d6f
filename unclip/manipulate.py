"""Variations, interpolations, text diffs, inpainting, redrawing and the PCA probe (section 3).

A picture is two latents: z_i, what CLIP sees in it, and x_T, all else that the decoder needs to draw this very picture
again. x_T comes from DDIM inversion under z_i (Song et al. 2020; Dhariwal & Nichol 2021, appendix F). Everything here
changes one of the two and draws again.

All functions take pictures as uint8 [n, 3, h, w] (RGB, any size; not square ones are cut to their centre) and return
uint8 [m, 3, size, size] on the host. `sampling` and `guidance` are as in `UnCLIP.generate`; what draws from a picture's
own x_T takes the decoder's steps and percentile of them alone, since x_T means nothing to another sampler or guide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.cascade import UnCLIP
from unclip.diffusion import Denoiser, Sampling, clip_x0, conditional, ddim_invert, noise_for, with_known_pixels
from unclip.errors import Refused
from unclip.models import Decoder, Upsampler
from unclip.pictures import centre_square, check_pictures, resized, to_unit
from unclip.sample import last_steps


class Latents(NamedTuple):
    """The two latents of n pictures."""

    embedding: Tensor
    """z_i, raw, [n, d]."""
    start: Tensor
    """x_T of the decoder, [n, 3, s, s]."""


def unconditional(model: UnCLIP, n: int, *, seeds: Sequence[int] | None = None, **options: Any) -> Tensor:
    """n pictures of anything: prior and decoder under the empty text, and no guide unless `options` name one."""
    _at_least_one(n)
    if "decoder" not in (options.get("sampling") or {}):
        options = {"labels": {}, "clip_guidance": 0.0} | options
    if model.prior is not None:
        options["prior_guidance"] = 1.0
    return model.generate([""] * n, seeds=seeds, **options)


@torch.no_grad()
def encode(model: UnCLIP, pictures: Tensor, *, steps: int | None = None, iterations: int = 3) -> Latents:
    """z_i and x_T of pictures; x_T gives them back by DDIM (η = 0, unguided, no caption) over as many steps.

    steps: of the inversion, default the release's of the decoder. iterations: see `samplers.ddim_invert`.
    Raises Refused for a decoder that draws from prompts alone: to it a picture has no z_i.
    """
    check_pictures(pictures)
    _check_draws_from_images(model)
    decoder = model.decoder
    schedule = decoder.schedule.respace(model.sampling["decoder"].steps if steps is None else steps)
    embeddings, starts = [], []
    for rows in torch.arange(len(pictures)).split(model.tile):
        shown = centre_square(pictures[rows].to(model.device))
        embedding = model.clip.encode_images(shown)
        context = decoder.context(embedding, *decoder.null_text.expand(len(rows)))
        base = to_unit(resized(shown, decoder.config.size))
        denoise = clip_x0(conditional(decoder.denoise, context), decoder.schedule)
        starts.append(ddim_invert(denoise, base, schedule, iterations=iterations))
        embeddings.append(embedding)
    return Latents(torch.cat(embeddings), torch.cat(starts))


def variations(
    model: UnCLIP, pictures: Tensor, *, n: int = 4, eta: float = 1.0, seeds: Sequence[int] | None = None, **options: Any
) -> Tensor:
    """n others of each picture that CLIP sees alike (section 3.1): its z_i and x_T, drawn by DDIM with η > 0.

    eta from 0 (the picture itself, as far as the decoder can) to 1. Picture i's are rows i·n to i·n + n − 1.
    """
    _at_least_one(n)
    latents = _latents(model, pictures, options)
    rows = torch.arange(len(pictures)).repeat_interleave(n)
    return _draw(model, latents.embedding[rows], latents.start[rows], eta=eta, seeds=seeds, **options)


def interpolate(
    model: UnCLIP, first: Tensor, second: Tensor, *, steps: int = 7, fixed: bool = False, seed: int = 0, **options: Any
) -> Tensor:
    """`steps` pictures from one picture [3, h, w] to another (section 3.2): z_i on the great circle between theirs.

    x_T goes along the great circle between theirs, or, if `fixed`, is one noise from `seed` for all of them.
    """
    both = torch.stack([resized_square(first, model), resized_square(second, model)])
    latents = _latents(model, both, options)
    shares = _shares(steps)
    embedding = torch.cat([slerp(latents.embedding[:1], latents.embedding[1:], share) for share in shares])
    if fixed:
        start = noise_for([seed], latents.start.shape[1:], stream="decoder", device=model.device)(0).expand(
            steps, -1, -1, -1
        )
    else:
        start = torch.cat([slerp(latents.start[:1], latents.start[1:], share) for share in shares])
    return _draw(model, embedding, start, seeds=[seed] * steps, **options)


def interpolate_prompts(
    model: UnCLIP, first: str, second: str, *, steps: int = 7, seed: int = 0, **options: Any
) -> Tensor:
    """`steps` pictures between two prompts: the prior's z_i of each, on the great circle between them, one x_T."""
    _check_draws_from_images(model)
    model.clip.tell_cut([first, second])
    settings = _settings(model, options)
    ends = _prior(model, [first, second], [seed, seed], settings)
    assert ends is not None  # this release has a prior
    embedding = torch.cat([slerp(ends[:1], ends[1:], share) for share in _shares(steps)])
    # The decoder is told no caption here, so there is none that CLIP could guide towards.
    settings["decoder"] = replace(settings["decoder"], clip_guidance=0.0)
    options["sampling"] = settings
    return model.decode(embedding, [""] * steps, seeds=[seed] * steps, **options)


def text_diff(
    model: UnCLIP, picture: Tensor, before: str, after: str, *, theta: float = 0.375, steps: int = 5, **options: Any
) -> Tensor:
    """A picture [3, h, w] led away from one description toward another (section 3.3), in `steps` pictures.

    z_i is turned toward norm(z_t − z_t0), the difference of the captions' embeddings, by shares from 0 to `theta` of
    the way (the paper ends between 0.25 and 0.5); x_T stays.
    """
    if not 0 < theta <= 1:
        raise Refused(f"theta is the share of the way toward the text, above 0 and at most 1, not {theta}")
    latents = _latents(model, resized_square(picture, model)[None], options)
    model.clip.tell_cut([before, after])
    text = model.clip.encode_text([after, before]).embedding
    difference = text[:1] - text[1:]
    if float(difference.norm()) < 1e-6 * float(text.norm()):
        raise Refused(f"{before!r} and {after!r} are the same to this release's CLIP; there is no difference to follow")
    embedding = torch.cat([slerp(latents.embedding, difference, theta * share) for share in _shares(steps)])
    return _draw(model, embedding, latents.start.expand(steps, -1, -1, -1), **options)


def redraw(
    model: UnCLIP,
    pictures: Tensor,
    prompts: Sequence[str],
    *,
    strength: float = 0.6,
    seeds: Sequence[int] | None = None,
    **options: Any,
) -> Tensor:
    """Pictures drawn over under a prompt each (SDEdit, Meng et al. 2021): noised, then denoised from there.

    strength in (0, 1]: the share of the decoder's steps that is done again; 1 leaves nothing of the picture.
    """
    check_pictures(pictures)
    seeds = _one_each(pictures, prompts, seeds)
    settings = _settings(model, options)
    schedule = last_steps(model.decoder.schedule.respace(settings["decoder"].steps), strength)
    base = to_unit(resized(centre_square(pictures.to(model.device)), model.decoder.config.size))
    noise = noise_for(seeds, base.shape[1:], stream="decoder", device=model.device)
    top = torch.full((len(base),), len(schedule) - 1, device=model.device)
    start = schedule.q_sample(base, noise(0), top)
    embedding = _prior(model, prompts, seeds, settings)
    return model.decode(embedding, prompts, seeds=seeds, start=start, depth=strength, **options)


def inpaint(
    model: UnCLIP,
    pictures: Tensor,
    masks: Tensor,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] | None = None,
    trained: bool | None = None,
    **options: Any,
) -> Tensor:
    """Pictures with what lies under their masks drawn anew under a prompt each; the rest stays.

    masks: bool [n, h, w], True where to draw. Any release can do it: at every step of every model what is known is put
    back, at that step's noise (Song et al. 2021, appendix I; Lugmayr et al. 2022, without resampling). trained: let the
    release's inpainter draw, which is told besides what is known, all of it without noise (GLIDE, section 2.4); None:
    where the release has one. Raises Refused where it has none to let.
    """
    check_pictures(pictures)
    inpainter = model.inpainter if trained in (None, True) else None
    if trained and inpainter is None:
        raise Refused("this release has no inpainter; the zero-shot way (the default then) fills in with any")
    if masks.shape != (len(pictures), *pictures.shape[2:]) or masks.dtype != torch.bool:
        raise Refused(
            f"masks must be bool {(len(pictures), *pictures.shape[2:])}, one a picture, not "
            f"{str(masks.dtype).removeprefix('torch.')} {tuple(masks.shape)}"
        )
    seeds = _one_each(pictures, prompts, seeds)
    shown = centre_square(pictures.to(model.device))
    drawn = centre_square(masks[:, None].to(model.device))
    networks: dict[str, Decoder | Upsampler] = {"decoder": inpainter or model.decoder, **model.by_side}

    def at(side: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(pictures in [-1, 1], what of them is free); a pixel is known only where nothing of it is to be drawn."""
        return to_unit(resized(shown[rows], side)), F.adaptive_max_pool2d(drawn[rows].float(), side) > 0

    def bind(denoise: Denoiser, component: str, rows: Sequence[int], numbers: Sequence[int]) -> Denoiser:
        network = networks[component]
        picture, free = at(network.config.size, list(rows))
        noise = noise_for(numbers, picture.shape[1:], stream=f"{component}/known", device=model.device)(0)
        return with_known_pixels(denoise, picture, free, noise, network.schedule)

    told = at(inpainter.config.size, list(range(len(shown)))) if inpainter is not None else None
    embedding = _prior(model, prompts, seeds, _settings(model, options))
    return model.decode(embedding, prompts, seeds=seeds, bind=bind, known=told, **options)


def probe(
    model: UnCLIP, pictures: Tensor, basis: Tensor, mean: Tensor, dimensions: Sequence[int], **options: Any
) -> Tensor:
    """What CLIP's principal directions hold (section 5, figure 7): pictures from z_i kept in its first k directions.

    basis [m, d], orthonormal rows by falling variance; mean [d] of raw image embeddings; dimensions: each k, at most m.
    x_T stays. Picture i's reconstructions are rows i·len(dimensions) and on.
    """
    width = model.clip.embedding_width
    if basis.ndim != 2 or basis.shape[1] != width or mean.shape != (width,):
        raise Refused(
            f"a basis of {list(basis.shape)} and a mean of {list(mean.shape)} are not of embeddings of {width}"
        )
    if not dimensions:
        raise Refused("there is nothing to draw: no number of directions to keep")
    if any(not 0 <= k <= len(basis) for k in dimensions):
        raise Refused(f"this basis has {len(basis)} directions; the numbers to keep must lie in 0…{len(basis)}")
    latents = _latents(model, pictures, options)
    basis, mean = basis.to(model.device), mean.to(model.device)
    centred = latents.embedding - mean
    kept = [mean + (centred @ basis[:k].T) @ basis[:k] for k in dimensions]
    rows = torch.arange(len(pictures)).repeat_interleave(len(dimensions))
    return _draw(model, torch.stack(kept, 1).flatten(0, 1), latents.start[rows], **options)


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """On the great circle between the directions of two vectors [b, …]; lengths go linearly from one to the other.

    share from 0 (the first) to 1 (the second). For opposite directions there is no one great circle: refused.
    """
    a, b = first.flatten(1), second.flatten(1)
    long_a, long_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    if bool((long_a == 0).any() | (long_b == 0).any()):
        raise Refused("there is no direction from or to a vector of length 0")
    a, b = a / long_a, b / long_b
    # The half angles stay exact where the vectors nearly agree, unlike the arc cosine of their product.
    angle = 2 * torch.atan2((a - b).norm(dim=1, keepdim=True), (a + b).norm(dim=1, keepdim=True))
    if bool((angle > math.pi - 1e-4).any()):
        raise Refused("the two point in opposite directions: there is no one way between them")
    sine = angle.sin()
    near = sine < 1e-6
    safe = torch.where(near, torch.ones_like(sine), sine)
    left = torch.where(near, torch.full_like(sine, 1 - share), ((1 - share) * angle).sin() / safe)
    right = torch.where(near, torch.full_like(sine, share), (share * angle).sin() / safe)
    return ((left * a + right * b) * ((1 - share) * long_a + share * long_b)).view_as(first)


def resized_square(picture: Tensor, model: UnCLIP) -> Tensor:
    """One picture [3, h, w] as a square of the release's size, so that two of different sizes go side by side."""
    check_pictures(picture[None])
    return resized(centre_square(picture[None]), model.size)[0]


def _at_least_one(n: int) -> None:
    if n < 1:
        raise Refused(f"there is nothing to draw: {n} pictures")


def _shares(steps: int) -> list[float]:
    if steps < 2:
        raise Refused(f"a way has at least 2 pictures, not {steps}")
    return [k / (steps - 1) for k in range(steps)]


def _check_draws_from_images(model: UnCLIP) -> None:
    if model.prior is None:
        raise Refused(
            "this release draws from prompts alone: to its decoder a picture has no image embedding that could be "
            "varied, interpolated or turned. It can draw, redraw and inpaint."
        )


def _one_each(pictures: Tensor, prompts: Sequence[str], seeds: Sequence[int] | None) -> list[int]:
    """The seeds, default 0, 1, 2, …; raises Refused unless each picture has one prompt and one seed."""
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    if not len(pictures) == len(prompts) == len(seeds):
        raise Refused(
            f"{len(pictures)} pictures with {len(prompts)} prompts and {len(seeds)} seeds: give one of each a picture"
        )
    return seeds


def _prior(
    model: UnCLIP, prompts: Sequence[str], seeds: Sequence[int], settings: Mapping[str, Sampling]
) -> Tensor | None:
    """The prior's z_i of each prompt and seed, in calls of the model's tile like `generate`'s; None without a prior."""
    if model.prior is None:
        return None
    found = []
    for first in range(0, len(prompts), model.tile):
        words, numbers = list(prompts[first : first + model.tile]), list(seeds[first : first + model.tile])
        missing = model.tile - len(words)
        text = model.clip.encode_text(words + words[-1:] * missing)
        z = model.sample_prior(text, numbers + numbers[-1:] * missing, settings["prior"])
        found.append(z[: len(words)])
    return torch.cat(found)


def _settings(model: UnCLIP, options: Mapping[str, Any]) -> dict[str, Sampling]:
    """Those of each component, as `UnCLIP.decode_image` will take them from the same options."""
    return model.settings(options.get("sampling"))


def _latents(model: UnCLIP, pictures: Tensor, options: Mapping[str, Any]) -> Latents:
    """`encode` over as many steps as `_draw` will take with the same options."""
    _check_draws_from_images(model)
    return encode(model, pictures, steps=_settings(model, options)["decoder"].steps)


def _draw(
    model: UnCLIP,
    embedding: Tensor,
    start: Tensor,
    *,
    eta: float = 0.0,
    seeds: Sequence[int] | None = None,
    **options: Any,
) -> Tensor:
    """Pictures of latents by DDIM: x_T means nothing to another sampler, nor under another guidance or caption."""
    settings = _settings(model, options)
    decoder = Sampling("ddim", settings["decoder"].steps, eta=eta, percentile=settings["decoder"].percentile)
    if options.get("guidance") is not None:
        decoder = replace(decoder, guidance=options.pop("guidance"))
    options["sampling"] = dict(options.get("sampling") or {}) | {"decoder": decoder}
    seeds = [0] * len(embedding) if seeds is None else seeds
    return model.decode(embedding, [""] * len(embedding), seeds=seeds, start=start, **options)
