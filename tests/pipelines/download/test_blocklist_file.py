"""A block list that lies in a file: what it says is in the key, and where it is wrong is told."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from infra.errors import Refused
from infra.store.opening import open_store
from pipelines.download.blocklist import entries_digest, read_file
from pipelines.download.guard import Fault
from pipelines.download.stage import Download, DownloadHow, DownloadSpec
from pipelines.stage import plain

LIST = """# hosts of advertisers
ads.test
  cdn.ads.test   # below it anyway

http*://*/banner_?/*
ads.test
bücher.test
"""


def write(folder: Path, text: str | bytes, name: str = "block.txt") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def of(path: str, **spec: tuple[str, ...]) -> Download:
    return Download.of(DownloadSpec(**spec), DownloadHow(block_file=path))


def test_entries_stand_a_line_each_beside_comments(tmp_path):
    expected = ("ads.test", "bücher.test", "cdn.ads.test", "http*://*/banner_?/*")
    assert read_file(write(tmp_path, LIST)) == expected
    assert read_file(write(tmp_path, b"\xef\xbb\xbf" + LIST.replace("\n", "\r\n").encode())) == expected


def test_what_it_blocks_is_in_the_key_and_its_place_order_and_comments_are_not(tmp_path):
    key = plain(of(write(tmp_path, LIST)).spec)
    assert key["block_sha256"] == entries_digest(read_file(write(tmp_path, LIST)))
    moved = write(tmp_path, "bücher.test\nhttp*://*/banner_?/*\nads.test\ncdn.ads.test # why\n", "moved.txt")
    assert plain(of(moved).spec) == key
    assert plain(of(write(tmp_path, LIST + "more.test\n")).spec) != key
    assert plain(of(write(tmp_path, "# nothing yet\n")).spec) == plain(DownloadSpec())


def test_recipe_and_file_block_together_and_the_stage_travels_with_both(tmp_path):
    path = write(tmp_path, LIST)
    stage = pickle.loads(pickle.dumps(of(path, block=("other.test",))))
    Path(path).unlink()
    with stage._fetcher() as fetch:
        for url in ("http://x.ads.test/", "http://other.test/", "http://a.test/Banner_1/b"):
            with pytest.raises(Fault) as fault:
                fetch(url)
            assert fault.value.state == "blocked", url
    assert "ads.test" not in repr(stage)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ads.test\n*.ads.test\n", r"block\.txt, line 2 has '\*\.ads\.test': a host stands for all below it"),
        ("# comment\n\n0.0.0.0 ads.test\n", r"block\.txt, line 3 has '0\.0\.0\.0 ads\.test'"),
        ("a" * 70 + "ü.test\n", r"line 1 .* is no host name"),
        (b"ads.test\nb\xfccher.test\n", r"block\.txt, line 2: this is not UTF-8"),
    ],
)
def test_what_is_no_entry_is_refused_with_file_and_line(tmp_path, text, message):
    with pytest.raises(Refused, match=rf"download\.block_file: .*{message}"):
        of(write(tmp_path, text))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(Refused, match=r"download\.block_file: .*nowhere cannot be read: No such file"):
        of(str(tmp_path / "nowhere"))
    with pytest.raises(Refused, match=r"download\.block_file: .* cannot be read"):
        of(str(tmp_path))


def test_a_block_list_is_read_from_s3(tmp_path, s3_uri):
    store = open_store(f"{s3_uri}/lists")
    store.put_new("hosts/block.txt", LIST.encode())
    assert read_file(f"{s3_uri}/lists/hosts/block.txt") == read_file(write(tmp_path, LIST))
    with pytest.raises(Refused, match=r"block_file: .*other\.txt cannot be read"):
        read_file(f"{s3_uri}/lists/hosts/other.txt")
