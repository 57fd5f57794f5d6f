"""Tars that exist already, honest and hostile: every sample in them ends in one state."""

from __future__ import annotations

import hashlib
import json
import tarfile

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import Refused
from infra.store.opening import open_store
from pipelines.source.columns import Columns
from pipelines.source.stage import SourceHow
from pipelines.source.tars import read, tar_digests
from tests.fixtures.samples import caption, gather_of, picture, plain, source_of, table_of, write_tar
from tests.fixtures.stages import make, todo


def link(name: str, kind: bytes, target: str = "/etc/passwd") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def states(tmp_path, members, columns: Columns | None = None) -> dict[str, str]:
    """Name of each sample's picture in the tar → the state it ends in."""
    how = SourceHow(tars=str(write_tar(tmp_path / "a.tar", members)))
    store = open_store(str(tmp_path / "store"))
    listed = make(store, source_of(how, columns=columns))
    taken = make(store, gather_of(how), listed)
    assert taken.rows == listed.states["listed"]
    return {str(row["url"]): str(row["state"]) for row in table_of(store, taken, "index.parquet")}


def test_samples_are_those_that_webdataset_finds(tmp_path):
    members = [
        ("./deep/er.d/a.png", picture(1)),
        ("./deep/er.d/a.txt", b" one \n"),
        ("b.JPG", picture(2, "JPEG")),
        ("b.json", json.dumps({"caption": "two", "url": "http://a.test/2.jpg", "views": 3}).encode()),
        ("b.seg.png", picture(9)),
        ("c.webp", picture(3, "WEBP")),
        ("c.txt", "drei – 三".encode()),
        ("c.json", b'{"caption": "not this"}'),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    with open(path, "rb") as file:
        found = list(read(file, "a.tar", Columns(keep=("views",))))
    others = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    pictures = [sample.get("png") or sample.get("jpg") or sample.get("webp") for sample in others]
    assert [one.sha256 for one in found] == [hashlib.sha256(data).digest() for data in pictures]
    assert [one.caption for one in found] == ["one", "two", "drei – 三"]
    assert [one.wrong for one in found] == [None] * 3
    assert [one.url for one in found] == [None, "http://a.test/2.jpg", None]
    assert [one.facts for one in found] == [{"views": None}, {"views": 3}, {"views": None}]
    raw = path.read_bytes()
    assert [raw[one.start : one.start + one.length] for one in found] == pictures


def test_every_hostile_sample_ends_in_its_state_and_takes_no_other_with_it(tmp_path):
    good = picture(0)
    got = states(
        tmp_path,
        [
            ("first.png", good),
            ("first.txt", b"good first"),
            ("../../outside.png", picture(1)),
            ("../../outside.txt", b"a name that leads out"),
            ("/etc/absolute.png", picture(2)),
            ("/etc/absolute.txt", b"a name from the root"),
            link("link.png", tarfile.SYMTYPE),
            ("link.txt", b"a link"),
            link("hard.png", tarfile.LNKTYPE, "first.png"),
            ("hard.txt", b"a hard link"),
            link("device.png", tarfile.CHRTYPE),
            ("device.txt", b"a device"),
            ("captionlink.png", picture(3)),
            link("captionlink.txt", tarfile.SYMTYPE),
            ("twice.png", picture(4)),
            ("twice.png", picture(5)),
            ("twice.txt", b"which of the two"),
            ("two.png", picture(6)),
            ("two.jpg", picture(6, "JPEG")),
            ("two.txt", b"two kinds"),
            ("bare.png", picture(7)),
            ("latin.png", picture(8)),
            ("latin.txt", "café".encode("latin-1")),
            ("long.png", picture(9)),
            ("long.txt", b"x" * ((1 << 20) + 1)),
            ("alone.txt", b"a caption without a picture"),
            ("nojson.png", picture(10)),
            ("nojson.json", b"{" * 100_000),
            ("half.png", picture(11)),
            ("half.json", b'{"caption": "\\ud800"}'),
            ("notpicture.png", b"<svg/>"),
            ("notpicture.txt", b"no picture"),
            ("cut.png", picture(12)[:1500]),
            ("cut.txt", b"half a picture"),
            ("ignored.cls", b"7"),
            ("Makefile", b"no ending"),
            ("last.png", picture(13)),
            ("last.txt", b"good last"),
        ],
    )
    assert got == {
        "a.tar/first.png": "kept",
        "a.tar/../../outside": "bad_name",
        "a.tar//etc/absolute": "bad_name",
        "a.tar/link": "not_a_file",
        "a.tar/hard": "not_a_file",
        "a.tar/device": "not_a_file",
        "a.tar/captionlink.png": "not_a_file",
        "a.tar/twice.png": "duplicate_key",
        "a.tar/two.png": "two_images",
        "a.tar/bare.png": "no_caption",
        "a.tar/latin.png": "bad_caption",
        "a.tar/long.png": "bad_caption",
        "a.tar/alone": "no_image",
        "a.tar/nojson.png": "bad_metadata",
        "a.tar/half.png": "bad_caption",
        "a.tar/notpicture.png": "not_an_image",
        "a.tar/cut.png": "truncated",
        "a.tar/last.png": "kept",
    }


def test_a_sparse_member_is_not_read_out(tmp_path):
    """A few bytes that stand for a petabyte of zeros."""
    info = tarfile.TarInfo("sparse.png")
    info.pax_headers = {"GNU.sparse.size": str(1 << 50), "GNU.sparse.map": "0,0"}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)
    with open(tmp_path / "a.tar", "rb") as file:
        (sample,) = read(file, "a.tar", Columns())
    assert (sample.wrong, sample.sha256) == ("not_a_file", None)


def test_a_picture_of_more_bytes_than_allowed_is_not_read(tmp_path):
    how = SourceHow(tars=str(write_tar(tmp_path / "a.tar", [("a.png", bytes(5000)), ("a.txt", b"large")])))
    store = open_store(str(tmp_path / "store"))
    stage = gather_of(how)
    small = type(stage)(type(stage.spec)(size=128, format="png", max_bytes=4999), stage.how)
    taken = make(store, small, make(store, source_of(how)))
    assert taken.states == {"too_many_bytes": 1}


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_tar_that_is_cut_off_anywhere_is_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    whole = write_tar(folder / "a.tar", plain(range(3))).read_bytes()
    with tarfile.open(folder / "a.tar") as tar:
        end = max(member.offset_data + member.size for member in tar.getmembers())
    (folder / "a.tar").write_bytes(whole[: data.draw(st.integers(0, end))])
    with open(folder / "a.tar", "rb") as file, pytest.raises(Refused, match=r"a.tar (is cut off|cannot be read)"):
        list(read(file, "a.tar", Columns()))


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    whole = bytearray(write_tar(tmp_path / "a.tar", plain(range(3))).read_bytes())
    with tarfile.open(tmp_path / "a.tar") as tar:
        header = tar.getmembers()[2].offset
    whole[header + 148 : header + 156] = b"7777777\0"  # its checksum
    (tmp_path / "a.tar").write_bytes(whole)
    with open(tmp_path / "a.tar", "rb") as file, pytest.raises(Refused, match="cut off or damaged"):
        list(read(file, "a.tar", Columns()))


def test_a_name_that_says_it_is_a_gigabyte_long_is_refused(tmp_path):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + (1 << 30) + 1024)  # a hole, which takes no room
    with open(tmp_path / "a.tar", "rb") as file, pytest.raises(Refused, match="a header of"):
        list(read(file, "a.tar", Columns()))


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, b"\x1f\x8b\x08" + bytes(600)])
def test_what_is_no_tar_is_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    how = SourceHow(tars=str(tmp_path))
    with pytest.raises(Refused, match=r"source.tars: a.tar cannot be read to its end"):
        make(open_store(str(tmp_path / "store")), source_of(how))


def test_a_linked_tar_is_refused(tmp_path):
    write_tar(tmp_path / "away" / "a.tar", plain(range(2)))
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").symlink_to(tmp_path / "away" / "a.tar")
    with pytest.raises(Refused, match="links are not followed"):
        tar_digests(str(tmp_path / "tars"))


def test_tars_are_a_glob_in_the_order_of_their_names_and_may_move(tmp_path):
    store = open_store(str(tmp_path / "store"))
    for number in (2, 0, 1):
        write_tar(tmp_path / "here" / str(number) / "x.tar", plain(range(10 * number, 10 * number + 10)))
    how = SourceHow(tars=str(tmp_path / "here" / "*" / "x.tar"))
    listed = make(store, source_of(how))
    rows = table_of(store, listed, "")
    assert [row["caption"] for row in rows] == [caption(seed) for seed in range(30)]
    taken = make(store, gather_of(how), listed)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = SourceHow(tars=str(tmp_path / "there" / "*" / "x.tar"))
    assert todo(store, source_of(moved)) == 0
    assert todo(store, gather_of(moved), listed) == 0
    assert taken.states == {"kept": 30}


def test_another_tar_leaves_the_shards_of_the_others_as_they_are(tmp_path):
    store = open_store(str(tmp_path / "store"))
    for number in range(3):
        write_tar(tmp_path / "tars" / f"{number}.tar", plain(range(40 * number, 40 * number + 40)))
    how = SourceHow(tars=str(tmp_path / "tars"))
    before = make(store, source_of(how, 16))
    make(store, gather_of(how), before)
    write_tar(tmp_path / "tars" / "3.tar", plain(range(120, 160)))
    after = make(store, source_of(how, 16))
    old, new = (len(one.only.facts["slices"]) for one in (before, after))
    assert 0 < todo(store, gather_of(how), after) <= new - old + 2
    assert after.rows == 160


def test_a_tar_that_changes_under_way_is_refused(tmp_path):
    store = open_store(str(tmp_path / "store"))
    how = SourceHow(tars=str(write_tar(tmp_path / "a.tar", plain(range(3)))))
    stage = source_of(how)
    listed = make(store, stage)
    write_tar(tmp_path / "a.tar", plain(range(1, 4)))
    with pytest.raises(Refused, match="no longer holds what it held"):
        make(store, gather_of(how), listed)
    with pytest.raises(Refused, match="changed while the run"):
        make(open_store(str(tmp_path / "other")), stage)


def test_tars_in_s3_give_the_shards_of_the_same_tars_in_a_folder(tmp_path, s3_uri):
    for number in range(2):
        write_tar(tmp_path / "tars" / f"{number}.tar", plain(range(10 * number, 10 * number + 10)))
    bucket = open_store(f"{s3_uri}/data")
    for number in range(2):
        bucket.put_new(f"set/{number}.tar", tmp_path / "tars" / f"{number}.tar")
    bucket.put_new("set/notes.txt", b"no tar")
    here, there = SourceHow(tars=str(tmp_path / "tars")), SourceHow(tars=f"{s3_uri}/data/set/*.tar")
    made = []
    for name, how in (("a", here), ("b", there)):
        store = open_store(str(tmp_path / name))
        listed = make(store, source_of(how))
        made.append((listed.version, make(store, gather_of(how), listed).version))
    assert made[0] == made[1]
