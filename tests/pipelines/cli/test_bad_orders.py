"""What a person may get wrong when drawing: through the command line each is one paragraph and exit code 2."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from infra.errors import Refused
from infra.store.opening import open_store
from pipelines.cli import main as cli
from pipelines.release.open import open_release
from tests.fixtures.release import write_release
from unclip.files import write_json

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("orders") / "release")


@pytest.fixture
def unclip(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, whole: Path) -> Run:
    """Runs the command line in a folder with pictures and a release of its own: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNCLIP_STORE", str(tmp_path / "store"))
    (tmp_path / "store").mkdir()
    shutil.copytree(whole, "release")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save("picture.png")
    Image.new("L", (8, 8), 255).save("small.png")
    Image.new("1", (18_000, 10_000)).save("bomb.png")
    Path("cut.png").write_bytes(Path("picture.png").read_bytes()[:300])
    Path("empty.png").write_bytes(b"")
    os.mkfifo("pipe.png")

    def run(*words: object) -> tuple[int, str, str]:
        asked = [*map(str, words), "--release", "release", "--out", "out.png"]
        monkeypatch.setattr(sys, "argv", ["unclip", *asked])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def refused(result: tuple[int, str, str], said: str, expected: int = 2) -> None:
    code, _, err = result
    assert code == expected, err
    assert err.startswith("unclip: ")
    assert len(err.strip().splitlines()) == 1, err
    assert said in err
    assert not Path("out.png").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "a", "--guidance", "nan"], "--guidance is nan; it must be a finite number"),
        (["generate", "a", "--guidance=-1"], "--guidance is -1.0; it must be at least 0"),
        (["generate", "a", "--prior-guidance", "inf"], "--prior-guidance is inf; it must be a finite number"),
        (["generate", "a", "--guidance", "1e38"], "it must be at most 100"),
        (["generate", "a", "-n", 0], "nothing to draw"),
        (["edit", "vary", "bomb.png"], "bomb.png"),
        (["edit", "vary", "cut.png"], "cut.png cannot be read as a picture"),
        (["edit", "vary", "empty.png"], "empty.png cannot be read as a picture"),
        (["edit", "vary", "pipe.png"], "pipe.png is no file"),
        (["generate", "a", "--label-guidance", 2], "there are none: add --label"),
        (["edit", "vary", "picture.png", "-n", -1], "nothing to draw"),
        (["edit", "interpolate", "a", "b", "--steps", 1], "at least 2 pictures"),
        (["edit", "diff", "picture.png", "a", "b", "--theta", "nan"], "theta"),
        (["edit", "redraw", "picture.png", "a", "--strength", "nan"], "--strength is"),
        (["edit", "inpaint", "picture.png", "small.png", "a"], "8×8 px, and the picture 40×40; they must be equally"),
    ],
)
def test_an_impossible_order_is_one_paragraph(unclip: Run, words: list, said: str) -> None:
    refused(unclip(*words), said)


def lost(release: Path) -> None:
    (release / "decoder/model.safetensors").unlink()


def changed(release: Path) -> None:
    data = bytearray((release / "decoder/model.safetensors").read_bytes())
    data[-1] ^= 1
    (release / "decoder/model.safetensors").unlink()
    (release / "decoder/model.safetensors").write_bytes(data)


def without_numbers(release: Path) -> None:
    path = release / "prior/model.safetensors"
    state = load_file(path)
    state["out.bias"][0] = float("nan")
    path.unlink()
    save_file(state, path)
    _resign(release)


def of_another_shape(release: Path) -> None:
    path = release / "prior/model.safetensors"
    state = load_file(path)
    state["out.bias"] = state["out.bias"][:-1].clone()
    path.unlink()
    save_file(state, path)
    _resign(release)


def _resign(release: Path) -> None:
    """release.json with the digest of the prior's weights as they are now."""
    import hashlib
    import json

    document = json.loads((release / "release.json").read_text())
    data = (release / "prior/model.safetensors").read_bytes()
    document["components"]["prior"]["model.safetensors"] = hashlib.sha256(data).hexdigest()
    (release / "release.json").unlink()
    write_json(release / "release.json", document)


@pytest.mark.parametrize(
    ("harm", "said", "code"),
    [
        (lost, "decoder/model.safetensors is missing", 5),
        (changed, "decoder/model.safetensors was altered", 5),
        (without_numbers, "not finite, in out.bias", 2),
        (of_another_shape, "prior/model.safetensors does not fit", 2),
        (lambda release: (release / "release.json").write_text("{"), "release.json cannot be read", 2),
    ],
    ids=["lost", "changed", "NaN", "shape", "JSON"],
)
def test_a_damaged_release_is_one_paragraph(unclip: Run, harm: Callable[[Path], None], said: str, code: int) -> None:
    harm(Path("release"))
    refused(unclip("generate", "a red circle", "-n", 1), said, code)


def test_prompts_longer_than_any_files_name_are_still_prompts(unclip: Run) -> None:
    code, _, err = unclip("edit", "interpolate", "a red circle, " * 30, "a blue square, " * 30, "--steps", 2)
    assert (code, err) == (0, "") or "is not seen" in err
    assert Path("out.png").exists()


def test_names_that_no_path_can_have_are_refused(unclip: Run) -> None:
    refused(unclip("generate", "a", "--store", "s" * 5000), "is no folder's path")
    with pytest.raises(Refused, match="names no release"):
        open_release(open_store("store"), "n" * 5000)


def test_an_empty_prompt_draws_and_a_long_one_says_what_was_cut(unclip: Run) -> None:
    import subprocess

    code, _, err = unclip("generate", "", "-n", 1)
    assert (code, err) == (0, "")
    assert Image.open("out.png").width > 64
    # In a process of its own: the command line decides what is logged, and pytest would decide otherwise.
    words = ["generate", "a red circle " * 20 + "zzz", "-n", "1", "--release", "release", "--out", "long.png"]
    ran = subprocess.run([sys.executable, "-m", "pipelines.cli", *words], capture_output=True, text=True, check=True)
    assert "zzz' at its end is not seen" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
