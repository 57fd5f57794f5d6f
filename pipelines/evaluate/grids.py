"""Pictures side by side with their prompts, as one PNG that a person looks at."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from infra.errors import Refused

MARGIN = 10
LINE = 15
FONT_SIZE = 12
LEAST_SIDE = 96
INK, PALE = (30, 30, 30), (120, 120, 120)


@dataclass(frozen=True)
class Cell:
    """A picture, uint8 [h, w, 3], what was asked for, and a remark in pale ink."""

    picture: NDArray[np.uint8]
    caption: str
    remark: str = ""


def sheet(cells: Sequence[Cell], columns: int) -> Image.Image:
    """Cells row by row, each caption under its picture."""
    shown = [_enlarged(cell.picture) for cell in cells]
    side = max(picture.width for picture in shown)
    font = ImageFont.load_default(FONT_SIZE)
    letters = max(8, int(side / font.getlength("n")))
    words = [_wrapped(cell, letters) for cell in cells]
    lines = max(len(text) for text in words)
    width, height = side + MARGIN, side + LINE * lines + MARGIN
    rows = -(-len(cells) // columns)
    canvas = Image.new("RGB", (width * min(columns, len(cells)) + MARGIN, height * rows + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (picture, text) in enumerate(zip(shown, words, strict=True)):
        left, top = MARGIN + number % columns * width, MARGIN + number // columns * height
        canvas.paste(picture, (left, top))
        for line, (string, ink) in enumerate(text):
            draw.text((left, top + side + 2 + line * LINE), string, ink, font)
    return canvas


def rows(pictures: NDArray[np.uint8], captions: Sequence[str]) -> Image.Image:
    """uint8 [captions, n, h, w, 3] → a row for each caption: its words, then its pictures."""
    shown = [[_enlarged(picture) for picture in row] for row in pictures]
    side = shown[0][0].width
    font = ImageFont.load_default(FONT_SIZE)
    label = 150
    letters = int(label / font.getlength("n"))
    step = side + MARGIN
    canvas = Image.new("RGB", (label + MARGIN + step * len(shown[0]), step * len(shown) + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (row, caption) in enumerate(zip(shown, captions, strict=True)):
        top = MARGIN + number * step
        for line, string in enumerate(textwrap.wrap(caption, letters)[: side // LINE]):
            draw.text((MARGIN, top + line * LINE), string, INK, font)
        for column, picture in enumerate(row):
            canvas.paste(picture, (label + MARGIN + column * step, top))
    return canvas


def save(image: Image.Image, path: Path) -> None:
    """Writes a PNG; raises Refused where the place cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, "PNG")
    except (OSError, ValueError) as error:
        raise Refused(f"the picture grid cannot be written to {path}: {error}") from None


def png(picture: NDArray[np.uint8]) -> bytes:
    """uint8 [h, w, 3] → PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(data: bytes) -> NDArray[np.uint8]:
    """The inverse of `png`."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _enlarged(picture: NDArray[np.uint8]) -> Image.Image:
    # Whole multiples and no smoothing: a person is to see the pixels that were made.
    image = Image.fromarray(picture)
    factor = -(-LEAST_SIDE // max(1, min(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _wrapped(cell: Cell, letters: int) -> list[tuple[str, tuple[int, int, int]]]:
    text = [(line, INK) for line in textwrap.wrap(cell.caption, letters)[:4]]
    return text + [(line, PALE) for line in textwrap.wrap(cell.remark, letters)[:2]]
