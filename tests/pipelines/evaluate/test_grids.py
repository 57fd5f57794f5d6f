"""Grids show every picture as it is, and its words."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from infra.errors import Refused
from pipelines.evaluate import grids
from pipelines.evaluate.grids import Cell


def picture(value: int, side: int = 128) -> np.ndarray:
    rng = np.random.default_rng(value)
    return rng.integers(0, 256, (side, side, 3), dtype=np.uint8)


def holds(image: Image.Image, wanted: np.ndarray) -> bool:
    """Whether the picture stands in the image somewhere, pixel by pixel."""
    canvas = np.asarray(image)
    side = wanted.shape[0]
    corners = np.argwhere((canvas[: 1 - side or None, : 1 - side or None] == wanted[0, 0]).all(-1))
    return any((canvas[y : y + side, x : x + side] == wanted).all() for y, x in corners)


def test_a_sheet_holds_every_picture_and_ink_under_it():
    cells = [Cell(picture(n), f"a red circle number {n} on a white background", "wrong: shape") for n in range(5)]
    image = grids.sheet(cells, 3)
    assert all(holds(image, cell.picture) for cell in cells)
    blank = grids.sheet([Cell(cell.picture, "") for cell in cells], 3)
    assert image.width == blank.width
    assert image.height > blank.height
    under = np.asarray(image)[grids.MARGIN + 128 : grids.MARGIN + 128 + 3 * grids.LINE, : 128 + grids.MARGIN]
    assert (under < 100).any()


def test_rows_hold_every_picture_beside_its_prompt():
    pictures = np.stack([[picture(2 * r + c) for c in range(2)] for r in range(3)])
    image = grids.rows(pictures, ["one", "two words", "three " * 50])
    assert all(holds(image, one) for row in pictures for one in row)
    assert (np.asarray(image)[:, : 150 - grids.MARGIN].reshape(3, -1) < 100).any()


def test_small_pictures_are_enlarged_by_whole_pixels():
    small = picture(1, 32)
    assert holds(grids.sheet([Cell(small, "")], 1), small.repeat(3, 0).repeat(3, 1))


def test_png_keeps_every_pixel():
    assert (grids.pixels(grids.png(picture(3))) == picture(3)).all()


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    image = grids.sheet([Cell(picture(1), "")], 1)
    grids.save(image, tmp_path / "new" / "grid.png")
    assert Image.open(tmp_path / "new" / "grid.png").size == image.size
    for path in (tmp_path / "file" / "grid.png", tmp_path):
        with pytest.raises(Refused, match="cannot be written"):
            grids.save(image, path)
