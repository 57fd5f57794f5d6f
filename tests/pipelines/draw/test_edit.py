"""`unclip edit`: a row of pictures for pictures, or one clear refusal."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from infra.errors import Refused
from infra.records.commits import commit
from infra.records.manifest import Action, Manifest, Record
from infra.store.local import LocalStore
from pipelines.cli.main import app
from pipelines.download.images import FORMATS
from pipelines.draw.edit import read_picture
from tests.fixtures.plain import ours, saved
from tests.fixtures.release import SAMPLING, write_inpainter, write_parts, write_release
from unclip import UnCLIP, manipulate
from unclip.diffusion.settings import Sampling
from unclip.errors import Refused as Impossible
from unclip.files import read_json, write_json
from unclip.release.folder import save_release


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("edit") / "release")


@pytest.fixture(scope="module")
def filling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same release with an inpainter."""
    root = tmp_path_factory.mktemp("filling")
    save_release(root / "release", "tiny", write_inpainter(write_parts(root)), SAMPLING, {"embed": "0" * 64})
    return root / "release"


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
        (["interpolate", "picture.png", "other.jpg", "--steps", 2, "--fixed"], 2),
        (["interpolate", "a red circle", "a blue square", "--steps", 2], 2),
        (["diff", "grey.png", "a red circle", "a blue circle", "--steps", 2], 3),
        (["redraw", "picture.png", "a red circle", "-n", 1], 2),
        (["inpaint", "picture.png", "mask.png", "a red circle", "-n", 1], 2),
    ],
)
def test_every_edit_writes_a_row_of_pictures(here: Path, folder: Path, words: list, pictures: int) -> None:
    edit(folder, *words, "--out", "row.png")
    side, margin, label = 128, 10, 150  # pipelines.evaluate.grids: pictures of 64 px are shown twice as large
    assert Image.open("row.png").width == label + margin + pictures * (side + margin)


def test_inpainting_uses_the_releases_inpainter_unless_told_otherwise(here: Path, folder: Path, filling: Path) -> None:
    rows = {}
    for name, drawing, how in (
        ("default", filling, []),
        ("trained", filling, ["--trained"]),
        ("zero-shot", filling, ["--zero-shot"]),
        ("without", folder, []),
    ):
        edit(drawing, "inpaint", "picture.png", "mask.png", "a red circle", "-n", 1, "--out", f"{name}.png", *how)
        rows[name] = Path(f"{name}.png").read_bytes()
    assert rows["default"] == rows["trained"] != rows["zero-shot"]
    assert rows["zero-shot"] == rows["without"]
    with pytest.raises(Impossible, match="has no inpainter"):
        edit(folder, "inpaint", "picture.png", "mask.png", "a", "--trained")


def test_the_probe_draws_along_the_directions_of_the_releases_data(here: Path, folder: Path) -> None:
    store, action = LocalStore(Path("store")), Action("statistics/1", {}, ())
    basis, _ = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))
    Path("out").mkdir()
    save_file({"pca": basis.contiguous(), "image_mean": torch.full((32,), 3.0)}, "out/statistics.safetensors")
    manifest = Manifest(action, (commit(store, action, Record.of(action, Path("out")), Path("out")),))
    made_of = saved(ours(upsamplers=[], sampling={"decoder": Sampling(steps=8)}), here)
    document = read_json(made_of / "release.json", "release")
    write_json(made_of / "release.json", document | {"data": {"statistics": manifest.save(store)}})
    edit(made_of, "probe", "picture.png", "--keep", 0, "--keep", 32)
    made = np.asarray(Image.open("grid.png"))
    side, margin, label = 96, 10, 150  # pipelines.evaluate.grids: pictures of 16 px are shown six times as large
    assert made.shape[1] == label + margin + 3 * (side + margin)
    model, shown = UnCLIP.load(made_of), read_picture(Path("picture.png"))[None]
    mean, itself = manipulate.probe(model, shown, basis, torch.full((32,), 3.0), [0, 32])
    assert not torch.equal(mean, itself)
    for place, wanted in ((1, mean), (2, itself)):
        left, large = label + margin + place * (side + margin), wanted.permute(1, 2, 0).numpy()
        column = made[:, left : left + side : 6]
        assert any(np.array_equal(column[top : top + side : 6], large) for top in range(len(column) - side + 1))
    with pytest.raises(Impossible, match="numbers to keep must lie in 0…32"):
        edit(made_of, "probe", "picture.png", "--keep", 33)
    with pytest.raises(Refused, match="says of no statistics in the store"):
        edit(folder, "probe", "picture.png")


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
        (["vary", "picture.png", "--eta", 2], "--eta is"),
        (["vary", "picture.png", "--eta", "nan"], "--eta is"),
        (["interpolate", "picture.png", "none.png"], "there is no file 'none.png'"),
        (["interpolate", "picture.png", "other.jpg", "--steps", 1], "at least 2 pictures"),
        (["diff", "picture.png", "a", "a"], "no difference to follow"),
        (["diff", "picture.png", "a", "b", "--theta", 2], "theta"),
        (["redraw", "picture.png", "a", "--strength", 0], "--strength is"),
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


@pytest.mark.parametrize(("mode", "name"), [("L", "a.png"), ("P", "a.gif"), ("CMYK", "a.tif"), ("LA", "a.webp")])
def test_other_colours_are_read_as_pillow_turns_them_into_rgb(here: Path, mode: str, name: str) -> None:
    Image.open("picture.png").convert(mode).save(name, **({"lossless": True} if name.endswith("webp") else {}))
    wanted = np.asarray(Image.open(name).convert("RGB"))
    assert (read_picture(Path(name)).permute(1, 2, 0).numpy() == wanted).all()


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_sixteen_bits_a_channel_are_scaled_and_not_clamped_to_white(here: Path, name: str) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(name)
    assert (read_picture(Path(name)).numpy() == (ramp >> 8)).all()


def test_what_is_gigantic_or_empty_or_of_unknown_depth_is_refused_unread(here: Path, recwarn) -> None:
    Image.new("L", (10_000, 6_401)).save("huge.png")
    Image.new("1", (18_000, 10_000)).save("bomb.png")  # 22 kB, and 720 MB of RGBA
    assert Path("bomb.png").stat().st_size < 100_000
    Path("empty.png").write_bytes(b"")
    Path("flat.png").write_bytes(_without_height(Path("picture.png").read_bytes()))
    Image.fromarray(np.ones((4, 4), np.float32)).save("float.tif")
    Path("page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")
    for name, said in {
        "huge.png": "10000×6401 px, more than 64,000,000",
        "bomb.png": "cannot be read|more than 64,000,000",
        "empty.png": "cannot be read",
        "flat.png": "cannot be read",
        "float.tif": "32 bits a channel",
        "page.eps": "cannot be read",  # Pillow would have Ghostscript run it
        ".": "is no file",
    }.items():
        with pytest.raises(Refused, match=said):
            read_picture(Path(name))
    assert not recwarn.list


def _without_height(png: bytes) -> bytes:
    """The same picture with a header that says 0 rows, its checksum right."""
    header = png[12:20] + bytes(4) + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_pictures_are_read_or_refused_and_nothing_else(tmp_path: Path, data: st.DataObject) -> None:
    body = bytearray(data.draw(st.sampled_from(BODIES)))
    for _ in range(data.draw(st.integers(0, 8))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "picture"
    path.write_bytes(body[: data.draw(st.integers(0, len(body)))])
    try:
        picture = read_picture(path)
    except Refused:
        return
    assert picture.dtype == torch.uint8
    assert picture.shape[0] == 3


def _bodies() -> list[bytes]:
    """A small picture in every format that is read."""
    found = []
    for form in (*FORMATS, "AVIF"):
        buffer = io.BytesIO()
        Image.linear_gradient("L").resize((24, 24)).convert("RGB").save(buffer, form)
        found.append(buffer.getvalue())
    return found


BODIES = _bodies()
