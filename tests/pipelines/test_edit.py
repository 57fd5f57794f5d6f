"""`unclip edit`: a row of pictures for pictures, or one clear refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from infra.errors import Refused
from pipelines.cli import app
from pipelines.edit import read_picture
from tests.fixtures.release import write_release
from unclip.errors import Refused as Impossible


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("edit") / "release")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pictures of several kinds, and the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    Image.fromarray(noise).save("picture.png")
    Image.fromarray(noise[:64]).resize((200, 100)).save("other.jpg")
    Image.fromarray(noise).convert("L").save("grey.png")
    mask = np.zeros((90, 70), np.uint8)
    mask[20:60, 20:60] = 255
    Image.fromarray(mask).save("mask.png")
    Image.new("L", (8, 8)).save("small.png")
    Image.new("L", (70, 90)).save("black.png")
    Path("broken.png").write_bytes(Path("picture.png").read_bytes()[:200])
    Path("words.txt").write_text("no picture")
    return tmp_path


def edit(folder: Path, *words: object) -> None:
    """Runs the command; what it refuses is raised."""
    CliRunner().invoke(
        app, ["edit", *map(str, words), "--release", str(folder), "--store", "store"], catch_exceptions=False
    )


@pytest.mark.parametrize(
    ("words", "pictures"),
    [
        (["vary", "picture.png", "-n", 2], 3),
        (["interpolate", "picture.png", "other.jpg", "--steps", 3], 3),
        (["interpolate", "a red circle", "a blue square", "--steps", 2], 2),
        (["diff", "grey.png", "a red circle", "a blue circle", "--steps", 2], 3),
        (["redraw", "picture.png", "a red circle", "-n", 1], 2),
        (["inpaint", "picture.png", "mask.png", "a red circle", "-n", 1], 2),
    ],
)
def test_every_edit_writes_a_row_of_pictures(here: Path, folder: Path, words: list, pictures: int) -> None:
    edit(folder, *words, "--out", "row.png")
    side, margin, label = 128, 10, 150  # pipelines.grids: pictures of 64 px are shown twice as large
    assert Image.open("row.png").width == label + margin + pictures * (side + margin)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vary", "none.png"], "none.png cannot be read"),
        (["vary", "broken.png"], "broken.png cannot be read"),
        (["vary", "words.txt"], "words.txt cannot be read"),
        (["vary", "picture.png", "-n", 0], "nothing to draw"),
        (["vary", "picture.png", "-n", 1000], "1,000 pictures are more than the 256"),
        (["vary", "picture.png", "--seed", -3], "--seed -3 cannot be"),
        (["vary", "picture.png", "--out", "row.gif"], "give a name that ends in .png"),
        (["diff", "picture.png", "a", "b", "--steps", 1000], "1,000 pictures are more than"),
        (["interpolate", "a", "b", "--out", "words.txt/row.png"], "words.txt/row.png cannot be written"),
        (["redraw", "picture.png", "a", "--out", "."], "give a name that ends in .png"),
        (["vary", "picture.png", "--eta", 2], "eta must lie between 0 and 1"),
        (["vary", "picture.png", "--eta", "nan"], "eta must lie between 0 and 1"),
        (["interpolate", "picture.png", "none.png"], "there is no file 'none.png'"),
        (["interpolate", "picture.png", "other.jpg", "--steps", 1], "at least 2 pictures"),
        (["diff", "picture.png", "a", "a"], "no difference to follow"),
        (["diff", "picture.png", "a", "b", "--theta", 2], "theta"),
        (["redraw", "picture.png", "a", "--strength", 0], "share of the steps"),
        (["inpaint", "picture.png", "small.png", "a"], "must be equally large"),
        (["inpaint", "picture.png", "black.png", "a"], "no white in it"),
    ],
)
def test_what_cannot_be_is_refused(here: Path, folder: Path, words: list, said: str) -> None:
    with pytest.raises((Refused, Impossible), match=said):
        edit(folder, *words)
    assert not Path("grid.png").exists()


def test_pictures_are_read_as_a_person_sees_them(here: Path) -> None:
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    image.save("clear.png")
    assert read_picture(Path("clear.png"))[:, 0].tolist() == [[0, 255, 255, 255], [0, 255, 255, 255], [255] * 4]
    upright = Image.new("RGB", (4, 2))
    exif = upright.getexif()
    exif[0x0112] = 6  # lies on its side
    upright.save("turned.jpg", exif=exif)
    assert tuple(read_picture(Path("turned.jpg")).shape) == (3, 4, 2)
    Image.new("L", (10_000, 6_401)).save("huge.png")
    with pytest.raises(Refused, match="more than 64,000,000"):
        read_picture(Path("huge.png"))
