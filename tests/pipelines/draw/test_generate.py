"""Pictures with a stored release: a grid, fast, or one clear refusal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra.errors import Refused
from infra.store.opening import open_store
from pipelines.draw.generate import generate_grid
from pipelines.evaluate.grids import MARGIN
from tests.fixtures.release import bundle, write_release
from unclip import UnCLIP


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("generate") / "release")


def test_a_row_a_prompt_and_a_column_a_seed(folder: Path, tmp_path: Path):
    store = open_store(str(tmp_path / "store"))
    asked = ["a red circle", "a blue square"]
    out = generate_grid(store, asked, str(folder), 2, 5, None, None, tmp_path / "grid.png")
    image = np.asarray(Image.open(out))
    pictures = UnCLIP.load(folder).generate([p for p in asked for _ in range(2)], seeds=[5, 6, 5, 6])
    shown = pictures.permute(0, 2, 3, 1).numpy().repeat(2, 1).repeat(2, 2)
    side = shown.shape[1]
    # From the lower right corner: a margin, the last picture, a margin, the one before it.
    bottom, right = image.shape[0] - MARGIN, image.shape[1] - MARGIN
    assert (image[bottom - side : bottom, right - side : right] == shown[3]).all()
    right -= side + MARGIN
    assert (image[bottom - side : bottom, right - side : right] == shown[2]).all()


def test_a_release_in_a_store_is_opened_by_its_version(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = open_store(str(tmp_path / "store"))
    version = bundle(store).version
    out = generate_grid(store, ["a red circle"], version[:12], 1, 0, 2.0, 1.0, tmp_path / "grid.png")
    assert Image.open(out).width > 64
    with pytest.raises(Refused, match="no champion yet"):
        generate_grid(store, ["a red circle"], "champion", 1, 0, None, None, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"guidance": float("nan")}, "--guidance is nan; it must be a finite number"),
        ({"guidance": -0.5}, "--guidance is -0.5; it must be at least 0"),
        ({"guidance": 1e9}, "--guidance is .*; it must be at most 100"),
        ({"prior_guidance": float("inf")}, "--prior-guidance is inf; it must be a finite number"),
        ({"n": 0}, "nothing to draw"),
        ({"prompts": []}, "nothing to draw"),
        ({"n": 257}, "257 pictures are more than the 256 that one command draws"),
        ({"n": 100, "prompts": ["a"] * 3}, "300 pictures are more than the 256"),
        ({"seed": -1}, "--seed -1 cannot be; seeds must be at least 0"),
        ({"seed": 10**30}, "seeds must be at most"),
        ({"out": "grid.jpg"}, "picture grids are PNG files; give a name that ends in .png"),
        ({"out": "/dev/null/deep/grid.png"}, "--out /dev/null/deep/grid.png cannot be written: "),
    ],
)
def test_impossible_orders_are_refused(folder: Path, tmp_path: Path, changes, reason):
    order = {"prompts": ["a"], "release": str(folder), "n": 1, "seed": 0, "guidance": None, "prior_guidance": None}
    with pytest.raises(Refused, match=reason):
        generate_grid(open_store(str(tmp_path / "store")), **{**order, "out": tmp_path / "grid.png", **changes})


def test_the_unseen_end_of_a_long_prompt_is_told(folder: Path, tmp_path: Path, caplog):
    prompt = "a red circle " * 20 + "zzz"
    generate_grid(open_store(str(tmp_path / "store")), [prompt], str(folder), 1, 0, None, None, tmp_path / "grid.png")
    assert "zzz' at its end is not seen" in caplog.text


@pytest.mark.slow
def test_generating_imports_neither_open_clip_nor_ray(folder: Path, tmp_path: Path):
    store, out = str(tmp_path / "store"), str(tmp_path / "grid.png")
    code = f"""
import sys
from pipelines.draw.generate import generate_grid
from infra.store.opening import open_store
generate_grid(open_store({store!r}), ["a red circle"], {str(folder)!r}, 1, 0, None, None, {out!r})
print([name for name in ("open_clip", "torchvision", "ray", "mlflow", "pandas", "pyarrow", "torch._dynamo")
       if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
