"""Pictures from pictures with a stored release, for `unclip edit`: read, given to unclip.manipulate, shown."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import Refused
from infra.store import Store
from pipelines.download import FORMATS
from pipelines.draw.checks import check_order, check_share, check_way

if TYPE_CHECKING:
    from torch import Tensor

    from unclip import UnCLIP

MOST_PIXELS = 64_000_000
"""Larger pictures are refused by their header, before they are decoded."""


def vary(store: Store, release: str, picture: Path, number: int, eta: float, seed: int, out: Path) -> Path:
    """That number of variations of a picture, beside it."""
    from unclip import manipulate

    check_order(number, seed=seed, out=out)
    check_share(eta=eta)
    model, (shown,) = _ready(store, release, [picture])
    drawn = manipulate.variations(model, shown[None], n=number, eta=eta, seeds=[seed + k for k in range(number)])
    return _saved(model, [shown], drawn, picture.name, out)


def interpolate(
    store: Store, release: str, first: str, second: str, steps: int, fixed: bool, seed: int, out: Path
) -> Path:
    """`steps` pictures between two pictures (both files that exist), or between two prompts.

    fixed: one noise for all of them, as prompts always have, instead of the way between the two pictures' own.
    """
    from unclip import manipulate

    check_order(steps, seed=seed, out=out)
    check_way(steps)
    files = [Path(first), Path(second)]
    there = [_is_file(file) for file in files]
    if there.count(True) == 1:
        raise Refused(f"there is no file {second if there[0] else first!r}; give two pictures, or two prompts")
    if all(there):
        model, (one, other) = _ready(store, release, files)
        drawn = manipulate.interpolate(model, one, other, steps=steps, fixed=fixed, seed=seed)
        return _saved(model, [], drawn, f"{files[0].name} to {files[1].name}", out)
    model, _ = _ready(store, release, [])
    drawn = manipulate.interpolate_prompts(model, first, second, steps=steps, seed=seed)
    return _saved(model, [], drawn, f"{first} to {second}", out)


def diff(
    store: Store, release: str, picture: Path, before: str, after: str, theta: float, steps: int, out: Path
) -> Path:
    """A picture led from one description toward another, in `steps` pictures."""
    from unclip import manipulate

    check_order(steps, out=out)
    check_way(steps)
    check_share(theta=theta)
    model, (shown,) = _ready(store, release, [picture])
    drawn = manipulate.text_diff(model, shown, before, after, theta=theta, steps=steps)
    return _saved(model, [shown], drawn, f"{before} to {after}", out)


def redraw(
    store: Store, release: str, picture: Path, prompt: str, strength: float, number: int, seed: int, out: Path
) -> Path:
    """That many times a picture drawn over under a prompt, beside it."""
    from unclip import manipulate

    check_order(number, seed=seed, out=out)
    check_share(strength=strength)
    model, (shown,) = _ready(store, release, [picture])
    pictures, seeds = shown.expand(number, -1, -1, -1), [seed + k for k in range(number)]
    drawn = manipulate.redraw(model, pictures, [prompt] * number, strength=strength, seeds=seeds)
    return _saved(model, [shown], drawn, prompt, out)


def inpaint(
    store: Store,
    release: str,
    picture: Path,
    mask: Path,
    prompt: str,
    number: int,
    seed: int,
    out: Path,
    trained: bool | None = None,
) -> Path:
    """That many times a picture with what is white in the mask drawn anew under a prompt, beside it.

    trained: by the release's inpainter (True), by its decoder (False), or by the inpainter where there is one (None).
    """
    from unclip import manipulate

    check_order(number, seed=seed, out=out)
    model, (shown, where) = _ready(store, release, [picture, mask])
    if shown.shape != where.shape:
        sides = [f"{tensor.shape[2]}×{tensor.shape[1]}" for tensor in (where, shown)]
        raise Refused(f"the mask {mask} is {sides[0]} px, and the picture {sides[1]}; they must be equally large")
    free = where.float().mean(0) > 127.5
    if not bool(free.any()):
        raise Refused(f"the mask {mask} has no white in it: there is nothing to draw")
    seeds = [seed + k for k in range(number)]
    pictures, masks = shown.expand(number, -1, -1, -1), free.expand(number, -1, -1)
    drawn = manipulate.inpaint(model, pictures, masks, [prompt] * number, seeds=seeds, trained=trained)
    return _saved(model, [shown], drawn, prompt, out)


def probe(store: Store, release: str, picture: Path, keep: Sequence[int] | None, seed: int, out: Path) -> Path:
    """A picture's embedding in its first k principal directions alone, for each k of `keep`, beside the picture.

    The directions are those of the data that the release was trained on. keep: None or empty for seven numbers that
    double, the last of them all.
    """
    from unclip import manipulate

    check_order(len(keep or ()) or 1, seed=seed, out=out)
    model, (shown,) = _ready(store, release, [picture])
    basis, mean = _directions(store, release)
    dimensions = list(keep or ()) or sorted({max(1, len(basis) >> halved) for halved in range(7)})
    drawn = manipulate.probe(model, shown[None], basis, mean, dimensions, seeds=[seed] * len(dimensions))
    words = f"{picture.name}, of {len(basis)} directions: {', '.join(map(str, dimensions))}"
    return _saved(model, [shown], drawn, words, out)


def read_picture(path: Path) -> Tensor:
    """A file as uint8 [3, h, w], RGB, upright, transparent parts on white; 16 bits a channel are rounded down to 8.

    Of a moving picture the first frame. Raises Refused for what is no picture of `FORMATS` or AVIF, for one that is
    broken, cut short or of more than `MOST_PIXELS`, and for 32 bits a channel, whose white is anybody's guess.
    """
    import warnings

    import numpy as np
    import torch
    from PIL import Image, ImageOps

    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise Refused(f"{path} is no file; give a picture file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MOST_PIXELS decides
            opened = Image.open(path, formats=(*FORMATS, "AVIF"))
        with opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise Refused(
                    f"{path} has {opened.width}×{opened.height} px, more than {MOST_PIXELS:,}; make it smaller"
                )
            if opened.mode in ("I", "F"):
                raise Refused(f"{path} has 32 bits a channel; save it with 8 or 16")
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I;16"):  # Pillow would clamp to 255 instead of scaling: all white
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            on_white = Image.new("RGBA", upright.size, "white")
            on_white.alpha_composite(upright.convert("RGBA"))
    except Refused:
        raise
    except Exception as error:  # noqa: BLE001 - decoders raise whatever hostile bytes make them raise
        raise Refused(f"{path} cannot be read as a picture ({error})") from None
    return torch.from_numpy(np.array(on_white.convert("RGB"))).permute(2, 0, 1)


def _is_file(path: Path) -> bool:
    """Whether a file lies there; a prompt may be longer than any file's name can be."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _directions(store: Store, release: str) -> tuple[Tensor, Tensor]:
    """(principal directions [d, d] by falling variance, mean [d]) of the image embeddings behind a release."""
    from infra.records import Manifest, object_name
    from pipelines.embed import TENSORS
    from pipelines.release import open_release
    from unclip.files import read_tensors
    from unclip.release import read_release

    version = read_release(open_release(store, release)).data.get("statistics")
    if version is None or not store.exists(object_name(version)):
        raise Refused(
            f"the release {release} says of no statistics in the store {store.uri} that they are its data's, and the "
            "probe draws along their principal directions; give the store in which it was trained"
        )
    tensors = read_tensors(store.local(object_name(Manifest.load(store, version, "statistics").only.sha(TENSORS))))
    return tensors["pca"], tensors["image_mean"]


def _ready(store: Store, release: str, pictures: Sequence[Path]) -> tuple[UnCLIP, list[Tensor]]:
    """The model, and the pictures, which are read first: a mistake should show before the models are loaded."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in pipelines.draw.generate
    shown = [read_picture(path) for path in pictures]
    from pipelines.release import open_release
    from unclip.cascade import UnCLIP

    return UnCLIP.load(open_release(store, release)), shown


def _saved(model: Any, given: Sequence[Tensor], drawn: Tensor, words: str, out: Path) -> Path:
    """One row: what was given, at the release's size, then what was drawn."""
    import torch

    from pipelines.evaluate import grids
    from unclip.manipulate import resized_square

    row = torch.cat([*(resized_square(picture, model)[None] for picture in given), drawn])
    grids.save(grids.rows(row.permute(0, 2, 3, 1)[None].numpy(), [words]), out)
    return out
