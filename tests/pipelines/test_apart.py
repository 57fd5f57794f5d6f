"""Pictures prepared in processes of their own: the same bytes, and one that ends its decoder costs its row alone."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from infra.rows import KEPT
from infra.store import open_store
from pipelines.apart import DIED, Apart
from pipelines.pictures import PictureSpec, prepare
from tests.fixtures.stages import PICTURES, download, make
from tests.fixtures.web import give, serving
from tests.pipelines.test_download import indexes, listed

pytestmark = pytest.mark.slow  # a process takes a second to import what it decodes with

POISON = b"a comment that ends the decoder"
FAULTY = f"""
import ctypes
from PIL import Image
whole = Image.open
def crash(file, **options):
    if {POISON!r} in file.getvalue():
        ctypes.string_at(0)
    return whole(file, **options)
Image.open = crash
"""
"""A library with a defect, for the processes that find it on their path: Pillow reads address 0, as C does that is led
astray by a file."""


def picture(seed: int, comment: bytes = b"") -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(out, "JPEG", comment=comment)
    return out.getvalue()


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faulty").mkdir()
    (tmp_path / "faulty" / "sitecustomize.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path / "faulty"))


def test_many_threads_get_what_they_would_get_here():
    spec = PictureSpec(size=32, format="png")
    bodies = [picture(seed) for seed in range(12)] + [picture(0)[:400], b"<html>", b""]
    with Apart(spec) as apart, ThreadPoolExecutor(2) as pool:
        assert list(pool.map(apart.prepare, bodies)) == [prepare(body, spec) for body in bodies]


def test_a_picture_that_ends_its_decoder_costs_its_row_and_no_other(tmp_path, faulty):
    store = open_store(str(tmp_path / "store"))
    bodies = [picture(0), picture(1, POISON), picture(2)]
    with serving() as web:
        for number, body in enumerate(bodies):
            web.answers[f"/{number}"] = lambda asked, body=body: give(asked, body=body)
        urls = [f"http://a.shapes.test/{number}" for number in range(len(bodies))]
        stage = download(web.port, PICTURES, threads=1).carefully()
        assert stage.how.apart
        manifest = make(store, stage, listed(store, pa.table({"url": urls, "caption": list("abc")})))
    (index,) = indexes(store, manifest)
    assert index["state"].to_pylist() == [KEPT, DIED, KEPT]
    assert manifest.states == {KEPT: 2, DIED: 1}
    assert all(sha is not None for sha in index["sha256"].to_pylist())  # which picture it was is known
