"""Bytes from the web → a picture that is worth keeping, resized and encoded, or the name of what is wrong with it.

Bytes are judged by their headers first (kind, sides, depth), so that nothing huge is decoded. Since OpenCV takes half a
picture for a whole one, Pillow then decodes them to their end, unless they are a JPEG whose markers show that it is
whole. img2dataset's resizer does the rest.
"""

from __future__ import annotations

import importlib.util
import io
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from infra.errors import Refused
from pipelines.download.jpeg import is_complete
from unclip.config import LATER, SEED, SIDE, Range, outside

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # what Pillow and OpenCV both read
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # of files that hold one
RESIZES = {"none": "no", "keep_ratio": "keep_ratio", "center_crop": "center_crop", "border": "border"}
LARGE = Range(1, SEED.most)
DECODE_S = Range(0, 86_400, above=True)
"""Seconds for one picture, at most a day: timers overflow."""
QUALITIES = {"jpg": (1, 100, 95), "webp": (1, 100, 95), "png": (0, 9, 6)}  # least, most, default

_ORIENTATION = 0x0112  # EXIF's tag
_ONE_LARGE = threading.Lock()
_LARGE_PIXELS = 1 << 22
"""Pictures with more pixels are decoded one at a time: threads full of the largest would take gigabytes."""

Slot = Callable[[int | None, int | None], AbstractContextManager[Any]]
"""Sides of a picture → what is held while it is decoded."""


@dataclass(frozen=True)
class PictureSpec:
    """What a picture must be to be kept, and what it is made into. Pictures are only ever made smaller."""

    size: int = 256
    """Side in pixels that larger pictures are brought down to: the shorter side, or the longer with `border`."""
    resize: str = "keep_ratio"
    """none, keep_ratio, center_crop (the middle square), or border (white margins to a square)."""
    format: str = "jpg"
    """jpg, png or webp."""
    quality: int | None = None
    """1–100 for jpg and webp (default 95); for png the compression level, 0–9 (default 6)."""
    min_side: int = 1
    """Pictures with a shorter side, in pixels, are `too_small`."""
    max_pixels: int = 100_000_000
    """Pictures with more pixels are `too_large`; they are not decoded."""
    min_bytes: int = 1
    """Shorter bodies are `too_few_bytes`."""
    max_bytes: int = 32 << 20
    """Longer bodies are `too_many_bytes`; reading stops there."""
    upright: bool = field(default=False, metadata=LATER)
    """Whether pictures are turned and mirrored as their EXIF orientation says; else they stay as they are stored."""

    def __post_init__(self) -> None:
        if self.resize not in RESIZES:
            raise Refused(f"download.resize is {self.resize!r}; use one of {', '.join(RESIZES)}")
        if self.format not in QUALITIES:
            raise Refused(f"download.format is {self.format!r}; use one of {', '.join(QUALITIES)}")
        least, most, _ = QUALITIES[self.format]
        if self.quality is not None and not least <= self.quality <= most:
            raise Refused(f"download.quality is {self.quality}; for {self.format} it lies between {least} and {most}")
        if wrong := outside(self, size=SIDE, min_side=SIDE, max_pixels=LARGE, min_bytes=SEED, max_bytes=LARGE):
            raise Refused(f"download.{wrong}")
        if self.min_bytes > self.max_bytes:
            raise Refused(f"download.min_bytes is {self.min_bytes}, more than max_bytes ({self.max_bytes})")


@dataclass(frozen=True)
class Picture:
    """What became of a body: `data` if it is kept, else the `state` that says why not. Sides are in pixels."""

    state: str | None
    data: bytes = b""
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None


def decode_slot(width: int | None, height: int | None) -> AbstractContextManager[Any]:
    """What a thread holds while it decodes a picture of these sides."""
    return _ONE_LARGE if (width or 0) * (height or 0) > _LARGE_PIXELS else nullcontext()


def prepare_picture(body: bytes, spec: PictureSpec, slot: Slot = decode_slot) -> Picture:
    """Judges, resizes and encodes one picture. The same bytes and spec give the same bytes, whatever else goes on."""
    if len(body) < spec.min_bytes:
        return Picture("too_few_bytes")
    state, width, height = _judge(body, spec, slot)
    if state:
        return Picture(state, original_width=width, original_height=height)
    with slot(width, height):
        if spec.upright:
            body = _turned(body)
        data, *sides, error = resizer(spec)(io.BytesIO(body))
    if error:  # Pillow could read it and OpenCV cannot
        return Picture("broken", original_width=width, original_height=height)
    return Picture(None, data, *sides)


def _judge(body: bytes, spec: PictureSpec, slot: Slot) -> tuple[str | None, int | None, int | None]:
    """(state or None, width, height), the latter as far as they are known."""
    from PIL import Image, UnidentifiedImageError

    width = height = None
    _hush_pillow()
    try:
        image = Image.open(io.BytesIO(body), formats=FORMATS)
        width, height = image.size
        if min(width, height) < spec.min_side:
            return "too_small", width, height
        if width * height > spec.max_pixels:
            return "too_large", width, height
        if image.mode[0] in "IF" or ";16" in str(image.tile):
            return "too_deep", width, height  # more than 8 bits a channel: the resizer would keep them
        if is_complete(body):
            return None, width, height  # a JPEG; what else may be wrong with it, the resizer finds as well
        image.draft("RGB", (max(1, width // 8), max(1, height // 8)))  # JPEG: all bytes are read, at an eighth the work
        with slot(width, height):
            image.load()
    except UnidentifiedImageError:
        return "not_an_image", None, None
    except Image.DecompressionBombError:
        return "too_large", None, None
    except Exception as error:  # noqa: BLE001 - decoders raise whatever hostile bytes make them raise; the row's state says so
        return "truncated" if "truncated" in str(error) else "broken", width, height
    return None, width, height


@cache
def _hush_pillow() -> None:
    """No warnings about sides (`max_pixels` decides) and broken EXIF, once a process: to hush each picture alone would
    change what all threads share."""
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def _turned(body: bytes) -> bytes:
    """The picture as its EXIF orientation has it, encoded without loss; the same bytes where it says nothing."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(body), formats=FORMATS) as image:
        if image.getexif().get(_ORIENTATION, 1) not in range(2, 9):
            return body
        out = io.BytesIO()
        turned = ImageOps.exif_transpose(image)
        (turned.convert("RGB") if turned.mode in ("CMYK", "YCbCr", "LAB", "HSV") else turned).save(out, "PNG")
    return out.getvalue()


class _Quiet:
    """In the place of the resizer's own class, which sends the process's standard streams to nowhere while OpenCV
    decodes: as a whole, and back as they were before, so that two threads could leave them there for good. Here the
    first of many threads sends them away, and the last brings them back."""

    _lock = threading.Lock()
    _inside = 0
    _kept: tuple[int, ...] = ()

    def __enter__(self) -> None:
        with _Quiet._lock:
            if not _Quiet._inside:
                _Quiet._kept = (os.dup(1), os.dup(2))
                nowhere = os.open(os.devnull, os.O_RDWR)
                os.dup2(nowhere, 1)
                os.dup2(nowhere, 2)
                os.close(nowhere)
            _Quiet._inside += 1

    def __exit__(self, *error: object) -> None:
        with _Quiet._lock:
            _Quiet._inside -= 1
            if not _Quiet._inside:
                for number, kept in zip((1, 2), _Quiet._kept, strict=True):
                    os.dup2(kept, number)
                    os.close(kept)


def picture(file: BinaryIO, offset: int, length: int) -> Image | None:
    """The picture at a place of a file, as a tar, in RGB, or None if it cannot be decoded."""
    file.seek(offset)
    return decode_picture(file.read(length))


def decode_picture(body: bytes) -> Image | None:
    """The picture of these bytes in RGB, or None if it cannot be decoded."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(body)) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return None


@cache
def resizer(spec: PictureSpec) -> Any:
    """img2dataset's Resizer for this spec: area interpolation downwards, no upscaling, alpha over white."""
    quality = QUALITIES[spec.format][2] if spec.quality is None else spec.quality
    return _resizer_module().Resizer(
        image_size=spec.size,
        resize_mode=RESIZES[spec.resize],
        resize_only_if_bigger=True,
        downscale_interpolation="area",
        encode_format=spec.format,
        encode_quality=quality,
    )


@cache
def _resizer_module() -> Any:
    """The module img2dataset.resizer, loaded from its own file.

    `import img2dataset.resizer` runs the package's __init__ first, which imports Ray, torch, pandas and wandb: 10 s in
    every worker, for a module that needs OpenCV and albumentations only.
    """
    package = importlib.util.find_spec("img2dataset")
    if package is None or package.origin is None:
        raise Refused("img2dataset is not installed; install unclip with its dependencies", code=5)
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for a newer version
    spec = importlib.util.spec_from_file_location(
        "unclip_img2dataset_resizer", Path(package.origin).with_name("resizer.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports imghdr
        spec.loader.exec_module(module)
    module.SuppressStdoutStderr = _Quiet  # type: ignore[attr-defined]
    return module
