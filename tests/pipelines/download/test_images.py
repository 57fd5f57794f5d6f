"""What a body from the web is worth."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from infra.errors import Refused
from pipelines.download.images import PictureSpec, prepare_picture


def image(width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(
        0, 255, (height, width, len(Image.new(mode, (1, 1)).getbands())), np.uint8
    )
    return Image.fromarray(pixels.squeeze(), mode)


def encode(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_kind_of_picture_is_kept_as_the_kind_asked_for(kind):
    made = prepare_picture(encode(image(), kind), PictureSpec(resize="none", format="png"))
    assert made.state is None
    assert decode(made.data).format == "PNG"
    assert decode(made.data).size == (64, 48)
    assert (made.original_width, made.original_height) == (64, 48)


def test_png_keeps_every_pixel():
    made = prepare_picture(encode(image()), PictureSpec(resize="none", format="png"))
    assert np.array_equal(np.asarray(decode(made.data)), np.asarray(image()))


@pytest.mark.parametrize(
    ("resize", "size"), [("none", (64, 48)), ("keep_ratio", (32, 24)), ("center_crop", (24, 24)), ("border", (24, 24))]
)
def test_pictures_are_brought_down_to_size(resize, size):
    made = prepare_picture(encode(image()), PictureSpec(size=24, resize=resize))
    assert decode(made.data).size == size == (made.width, made.height)
    assert (made.original_width, made.original_height) == (64, 48)


@pytest.mark.parametrize("resize", ["keep_ratio", "center_crop", "border"])
def test_pictures_are_never_made_larger(resize):
    made = prepare_picture(encode(image()), PictureSpec(size=500, resize=resize))
    assert decode(made.data).size == (64, 48)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_pictures_are_turned_upright_where_asked_for_and_else_stay_as_stored(orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = encode(image().resize((6, 5)).resize((60, 50)).convert(mode), "JPEG", exif=exif, quality=100)
    stored = prepare_picture(body, PictureSpec(resize="none", format="png"))
    upright = prepare_picture(body, PictureSpec(resize="none", format="png", upright=True))
    assert (stored.width, stored.height) == (60, 50)
    expected = np.asarray(ImageOps.exif_transpose(decode(body)).convert("RGB"), float)
    got = np.asarray(decode(upright.data), float)
    assert got.shape == expected.shape
    assert np.abs(got - expected).mean() < 8  # two decoders, and two ways from CMYK to RGB
    if orientation == 1:
        assert upright == stored


def test_many_threads_prepare_at_once_and_leave_the_streams_as_they_were():
    body, spec = encode(image(300, 200), "JPEG"), PictureSpec(size=64)
    alone, before = prepare_picture(body, spec), (os.fstat(1), os.fstat(2))
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: prepare_picture(body, spec), range(200))) == {alone}
    assert (os.fstat(1).st_ino, os.fstat(2).st_ino) == tuple(one.st_ino for one in before)


def test_transparency_is_laid_over_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    made = prepare_picture(encode(clear), PictureSpec(format="png"))
    assert decode(made.data).getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_half_a_picture_is_not_kept(kind):
    whole = encode(image(200, 200), kind)
    made = prepare_picture(whole[: len(whole) // 2], PictureSpec())
    assert made.state in ("truncated", "broken")
    assert made.data == b""


def test_a_jpeg_without_its_last_part_is_truncated():
    whole = encode(image(200, 200), "JPEG")
    assert prepare_picture(whole, PictureSpec()).state is None
    assert prepare_picture(whole[:-300], PictureSpec()).state == "truncated"


def bomb() -> bytes:
    """A PNG of 100,000 × 100,000 pixels in under 100 bytes: its header alone says so."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("body", "spec", "state"),
    [
        (b"<!doctype html><p>Please log in.", PictureSpec(), "not_an_image"),
        (b"", PictureSpec(), "too_few_bytes"),
        (encode(image()), PictureSpec(min_bytes=10**6), "too_few_bytes"),
        (encode(image()), PictureSpec(min_side=49), "too_small"),
        (encode(image()), PictureSpec(max_pixels=64 * 48 - 1), "too_large"),
        (bomb(), PictureSpec(max_pixels=10**12), "too_large"),
        (bomb(), PictureSpec(), "too_large"),
        (encode(Image.new("I;16", (64, 48))), PictureSpec(), "too_deep"),
        (encode(image())[:40] + b"garbage" * 100, PictureSpec(), "broken"),
        (b"%PDF-1.4 and so on", PictureSpec(), "not_an_image"),
    ],
)
def test_what_is_not_kept_has_a_name(body, spec, state):
    made = prepare_picture(body, spec)
    assert made.state == state
    assert made.data == b""


def test_the_same_bytes_give_the_same_bytes():
    body, spec = encode(image(300, 200), "JPEG"), PictureSpec(size=64, resize="center_crop")
    assert prepare_picture(body, spec) == prepare_picture(body, spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": "stretch"}, "resize is 'stretch'; use one of none, keep_ratio"),
        ({"format": "gif"}, "format is 'gif'"),
        ({"format": "png", "quality": 95}, "for png it lies between 0 and 9"),
        ({"size": 0}, "size is 0"),
        ({"min_bytes": 10, "max_bytes": 5}, "min_bytes is 10"),
    ],
)
def test_impossible_specs_are_refused(options, message):
    with pytest.raises(Refused, match=message):
        PictureSpec(**options)


@pytest.mark.slow
def test_the_resizer_is_had_without_all_that_img2dataset_imports():
    code = (
        "import sys; from pipelines.download.images import *; resizer(PictureSpec());"
        "sys.exit(str([m for m in ('torch', 'ray', 'wandb', 'pandas', 'img2dataset') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"
