"""A source is read again when it has changed, and a plan does not read what is large."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from infra.errors import Refused
from infra.store.opening import open_store
from pipelines.engine import plan as planning
from pipelines.run import prepared
from pipelines.source import digest_cache as remembered
from pipelines.source import folders, lists, tars
from pipelines.source.columns import Columns
from pipelines.source.stage import SourceHow


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own, in which what was just written is remembered too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "YOUNG_S", -60)
    return tmp_path / "cache"


def picture(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


def write_tar(path: Path, shade: int) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in (("a.png", picture(shade)), ("a.txt", b"a picture")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def sources(folder: Path) -> dict[str, tuple[SourceHow, Path]]:
    """One source of each kind, and a file of it."""
    for name in ("tars", "folder"):
        (folder / name).mkdir()
    write_tar(folder / "tars" / "0.tar", 1)
    write_tar(folder / "tars" / "1.tar", 2)
    (folder / "folder" / "a.png").write_bytes(picture(1))
    (folder / "folder" / "a.txt").write_text("a picture")
    (folder / "list.csv").write_text("url,caption\nhttps://pictures.test/1.png,a picture\n")
    return {
        "tars": (SourceHow(tars=str(folder / "tars")), folder / "tars" / "1.tar"),
        "folder": (SourceHow(folder=str(folder / "folder")), folder / "folder" / "a.txt"),
        "urls": (SourceHow(urls=str(folder / "list.csv")), folder / "list.csv"),
    }


@pytest.mark.parametrize("kind", ["tars", "folder", "urls"])
def test_what_was_read_is_read_again_once_it_has_changed(kind, tmp_path):
    how, file = sources(tmp_path)[kind]
    before = how.digests(Columns())
    assert how.unread(Columns()) == 0
    assert how.digests(Columns()) == before
    status = file.stat()
    file.write_bytes(file.read_bytes().replace(b"a picture", b"A picture"))  # of the same size
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # and as old as before
    assert how.unread(Columns()) > 0
    assert how.digests(Columns()) != before


def test_of_many_tars_those_that_are_new_are_read_alone(tmp_path):
    how, file = sources(tmp_path)["tars"]
    how.digests(Columns())
    write_tar(file.with_name("2.tar"), 3)
    assert tars.unhashed_bytes(str(file.parent)) == file.with_name("2.tar").stat().st_size


def test_other_columns_are_another_reading_of_a_folder(tmp_path):
    how, _ = sources(tmp_path)["folder"]
    how.digests(Columns())
    assert folders.unhashed_bytes(how.folder, Columns(caption="text")) > 0


def test_what_has_just_been_written_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(remembered, "YOUNG_S", 60)
    how, file = sources(tmp_path)["urls"]
    how.digests(Columns())
    assert lists.unhashed_bytes(str(file)) == file.stat().st_size


def test_a_cache_that_cannot_be_had_costs_nothing_but_time(tmp_path, cache):
    how, _ = sources(tmp_path)["urls"]
    cache.write_text("no folder")
    assert how.digests(Columns()) == how.digests(Columns())


def planned(store: Path, *changes: str):
    open_store(str(store))
    with prepared("tiny", str(store), ["world=null", "download.resolve={}", *changes], create=False) as job:
        return {line.stage: line for line in planning.plan(job.stages, job.store)}, job.missing


PROMPTS = ("evaluate.prompts=prompts.jsonl", "evaluate.judge=null", "evaluate.reference=null")


def test_a_plan_without_its_list_shows_the_models_and_says_what_is_missing(tmp_path):
    lines, missing = planned(tmp_path / "store", *PROMPTS, f"source.urls={tmp_path}/nowhere.parquet")
    assert isinstance(missing, Refused)
    assert "nowhere.parquet" in str(missing)
    assert lines["source"].why == "its source cannot be read"
    assert (lines["download"].shards, lines["download"].todo, lines["filter"].todo) == (None, None, 1)
    assert all(lines[name].parameters for name in ("prior", "decoder", "upsampler-32", "upsampler-64"))


def test_a_plan_reads_no_large_source_that_is_new(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "PLAN_BYTES", 20_000)
    how, file = sources(tmp_path)["tars"]
    lines, missing = planned(tmp_path / "store", *PROMPTS, f"source.tars={file.parent}")
    assert missing is None
    assert lines["source"].why.endswith("of the source are new: a run reads them first")
    assert lines["download"].shards is None
    how.digests(Columns())  # as a run does
    lines, _ = planned(tmp_path / "store", *PROMPTS, f"source.tars={file.parent}")
    assert "are new" not in lines["source"].why
    assert lines["download"].shards is None  # it would have to be cut to be counted
    monkeypatch.setattr(planning, "PLAN_BYTES", 1 << 30)
    lines, _ = planned(tmp_path / "store", *PROMPTS, f"source.tars={file.parent}")
    assert (lines["download"].shards, lines["download"].at_most) == (1, False)
