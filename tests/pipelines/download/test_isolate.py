"""Pictures that end or hold their decoders: in processes of their own they cost their rows, else the process ends."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from infra.errors import Refused
from infra.records.schemas import KEPT
from infra.store.opening import open_store
from pipelines.download.images import PictureSpec, prepare_picture
from pipelines.download.isolate import DIED, HUNG, IsolatedDecoder
from tests.fixtures.stages import PICTURES, download, make
from tests.fixtures.web import give, serving
from tests.pipelines.download.test_download import indexes, listed

pytestmark = pytest.mark.slow  # a process takes a second to import what it decodes with

CRASHES, HANGS, HOLDS = b"a comment that ends the decoder", b"one that it never leaves", b"nor lets others run"
FAULTY = f"""
import ctypes
from PIL import Image
whole = Image.open
def astray(file, **options):
    body = file.getvalue()
    if {CRASHES!r} in body:
        ctypes.string_at(0)
    if {HANGS!r} in body:
        ctypes.CDLL(None).pause()
    if {HOLDS!r} in body:
        ctypes.PyDLL(None).pause()
    return whole(file, **options)
Image.open = astray
"""
"""A library with defects, for the processes that find it on their path: as C does that is led astray by a file, Pillow
reads address 0, or waits in the kernel for ever, which takes the interpreter's lock with it or not."""
WATCHED = """
import sys, threading, time
from pathlib import Path
from pipelines.download import images as pictures
from pipelines.download.isolate import picture_decoder
whole, large, bad = (Path(name).read_bytes() for name in sys.argv[1:])
spec = pictures.PictureSpec(size=32)
pictures.prepare_picture(whole, spec)  # imports what it needs
with picture_decoder(spec, apart=False, seconds=2.0) as prepare:
    with pictures.decode_slot(100_000, 100_000):
        waiting = threading.Thread(target=prepare, args=(large,))
        waiting.start()
        time.sleep(3.0)
    waiting.join()
    print(prepare(whole).state, flush=True)
    prepare(bad)
"""


def picture(seed: int, comment: bytes = b"", sides: tuple[int, int] = (40, 50)) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (*sides, 3), np.uint8)
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
    with IsolatedDecoder(spec, 60.0) as apart, ThreadPoolExecutor(2) as pool:
        assert list(pool.map(apart.prepare, bodies)) == [prepare_picture(body, spec) for body in bodies]


def test_a_picture_that_ends_or_holds_its_decoder_costs_its_row_and_no_other(tmp_path, faulty):
    store = open_store(str(tmp_path / "store"))
    bodies = [picture(0), picture(1, CRASHES), picture(2, HOLDS), picture(3)]
    with serving() as web:
        for number, body in enumerate(bodies):
            web.answers[f"/{number}"] = lambda asked, body=body: give(asked, body=body)
        urls = [f"http://a.shapes.test/{number}" for number in range(len(bodies))]
        stage = download(web.port, PICTURES, threads=1, decode_s=3.0).carefully()
        assert stage.how.isolate
        manifest = make(store, stage, listed(store, pa.table({"url": urls, "caption": list("abcd")})))
    (index,) = indexes(store, manifest)
    assert index["state"].to_pylist() == [KEPT, DIED, HUNG, KEPT]
    assert manifest.states == {KEPT: 2, DIED: 1, HUNG: 1}
    assert all(sha is not None for sha in index["sha256"].to_pylist())  # which picture it was is known


@pytest.mark.parametrize("comment", [HANGS, HOLDS])
def test_a_picture_that_holds_its_decoder_ends_the_process_and_one_that_waits_for_others_does_not(
    tmp_path, faulty, comment
):
    bodies = {"whole": picture(0), "large": picture(1, sides=(2100, 2000)), "bad": picture(2, comment)}
    for name, body in bodies.items():
        (tmp_path / name).write_bytes(body)
    command = [sys.executable, "-c", WATCHED, *(str(tmp_path / name) for name in bodies)]
    path = {"PYTHONPATH": os.pathsep.join(one for one in sys.path if one)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | path, check=False)
    assert (done.returncode, done.stdout) == (1, "None\n"), done.stderr
    assert "in astray" in done.stderr  # where it hung is told


def test_processes_that_cannot_start_fail_the_shard_and_cost_no_row(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit(1)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with (
        IsolatedDecoder(PictureSpec(), 60.0) as apart,
        pytest.raises(Refused, match="ended before it had one") as caught,
    ):
        apart.prepare(picture(0))
    assert caught.value.code == 5
