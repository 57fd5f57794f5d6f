"""Lists as they come: what is read all the same, and what is refused with the file, the line and what to do."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.errors import Refused
from pipelines.source.columns import Columns
from pipelines.source.stage import SourceHow

HEAD = b"url,caption\n"
NAMED = Columns(header=("url", "caption"))
KEEP = Columns(keep=("n",))


def read(urls: Path | str, columns: Columns | None = None) -> list[tuple[str | None, str | None]]:
    """All rows of a list, as a run reads them."""
    how, columns = SourceHow(str(urls)), columns or Columns()
    batches = how.rows(columns, how.digests(columns))
    return [(row["url"], row["caption"]) for batch in batches for row in batch.to_pylist()]


ROWS = [("http://a", "b"), ("http://c", "d")]
FINE = {
    "a byte order mark": ("list.csv", b"\xef\xbb\xbf" + HEAD + b"http://a,b\nhttp://c,d\n", None),
    "one in JSON lines": (
        "list.jsonl",
        b'\xef\xbb\xbf{"url":"http://a","caption":"b"}\n{"url":"http://c","caption":"d"}',
        None,
    ),
    "carriage returns": ("list.csv", b"url,caption\r\nhttp://a,b\r\nhttp://c,d\r\n", None),
    "no line feed at all": ("list.csv", b"url,caption\rhttp://a,b\rhttp://c,d\r", None),
    "empty lines": ("list.csv", HEAD + b"\nhttp://a,b\n\n\nhttp://c,d\n\n", None),
    "other columns, another order": ("list.csv", b"n,caption,url\n1,b,http://a\n2,d,http://c\n", None),
    "a header said": ("list.csv", b"http://a,b\nhttp://c,d\n", NAMED),
    "a header said that is there": ("list.csv", b"\xef\xbb\xbf" + HEAD + b"http://a,b\nhttp://c,d\n", NAMED),
    "one that is there in quotes": ("list.csv", b'"url","caption"\r\nhttp://a,b\r\nhttp://c,d\r\n', NAMED),
}


@pytest.mark.parametrize("case", FINE)
def test_what_is_only_written_otherwise_is_read(tmp_path: Path, case: str) -> None:
    name, content, columns = FINE[case]
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name, columns) == ROWS


def test_quotes_hold_separators_and_lines_and_words_for_nothing_are_words(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_bytes(HEAD + b'http://a,"say ""hi"", you\nthere"\nNA,null\n,nan\n')
    assert read(tmp_path / "1.csv") == [("http://a", 'say "hi", you\nthere'), ("NA", "null"), ("", "nan")]
    (tmp_path / "2.tsv").write_bytes(b'url\tcaption\nhttp://a\ta 5" pipe\nhttp://b\t"ends\n"\n')
    assert read(tmp_path / "2.tsv") == [("http://a", 'a 5" pipe'), ("http://b", "ends\n")]


def test_what_says_nothing_is_null_or_empty_and_ends_as_a_row_without_it(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_bytes(b'{"url":null,"caption":"b"}\n{"caption":null,"url":"http://a"}\n{"url":"c"}\n')
    assert read(tmp_path / "1.jsonl") == [(None, "b"), ("http://a", None), ("c", None)]


LINES = b'{"url":"http://a","caption":"b"}\n'
BAD = {
    "UTF-16": ("list.csv", "url,caption\n".encode("utf-16"), "written in UTF-16; write it in UTF-8"),
    "too short a row": ("list.csv", HEAD + b"http://a,b\nhttp://c\n", r"Row #3: Expected 2 columns, got 1.*in quotes"),
    "too long a row": ("list.csv", HEAD + b"http://a,b\nhttp://c,d,e\n", r"Row #3: Expected 2 columns, got 3"),
    "a quote left open": (
        "list.csv",
        HEAD + b'http://a,b\nhttp://c,"d\nhttp://e,f\n',
        "opens a quote in row 2 that nothing closes",
    ),
    "a huge row": ("list.csv", HEAD + b"http://a," + b"x" * (3 << 20) + b"\n", "longer than 1 MB"),
    "a huge line": ("list.jsonl", LINES + b'{"url":"' + b"x" * (3 << 20) + b'"}\n', r"line 2 is longer than 1 MB"),
    "nothing": ("list.csv", b"", "it is empty; leave it out"),
    "no lines": ("list.jsonl", b"", "it is empty; leave it out"),
    "gzip": ("list.csv", gzip.compress(HEAD + b"http://a,b\n"), "compressed with gzip; unpack it first"),
    "Parquet": ("list.csv", b"PAR1" + b"\0" * 100, r"it is a Parquet file; give it the ending \.parquet"),
    "no Parquet": ("list.parquet", HEAD, "no Parquet file; get it again"),
    "an array": ("list.jsonl", b"[" + LINES.strip() + b"]", "line 1 is a list; write one object a line"),
    "no JSON": ("list.jsonl", LINES * 3 + b'{"url": oops}\n', "line 4 is no JSON .*; write one object a line"),
    "another kind, late": (
        "list.jsonl",
        LINES * 100_000 + b'{"url":5,"caption":"d"}\n',
        "line 100,001 has a number in 'url', and lines before it a text",
    ),
    "a number": ("list.jsonl", b'{"url":"http://a","caption":5}\n', "column 'caption' of list.jsonl holds int64"),
    "a name twice": ("list.csv", b"url,url,caption\na,b,c\n", "multiple columns named url; give each column a name"),
    "a key twice": ("list.jsonl", b'{"url":"a","url":"b","caption":"c"}\n', "give each key a name of its own"),
    "names with blanks": ("list.csv", b"url, caption\na, b\n", "Its columns: url, ' caption'"),
    "no header": ("list.csv", b"http://a,b\nhttp://c,d\n", "no column 'url'. Its columns: http://a, b"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_refused_with_the_file_and_what_to_do(tmp_path: Path, case: str) -> None:
    name, content, said = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refused, match=said) as refused:
        read(tmp_path / name)
    assert name in str(refused.value)
    assert str(refused.value).startswith(("source.urls: ", "source.columns."))
    assert len(str(refused.value)) < 600


def test_parquet_that_is_not_what_it_seems_is_refused(tmp_path: Path) -> None:
    table = {"url": [f"http://a/{n}" for n in range(9000)], "caption": ["b"] * 9000}
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table(table), path, compression="none", row_group_size=3000)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(Refused, match="cut off, or no Parquet file; get it again"):
        read(path)
    for column, kind in (("url", pa.array([b"a"], pa.binary())), ("caption", pa.array([["a"]]))):
        pq.write_table(pa.table({**{name: ["x"] for name in table}, column: kind}), path)
        with pytest.raises(Refused, match=f"source.columns.{column}: column '{column}' .* not text; name another"):
            read(path)
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 3, names=["url", "url", "caption"]), path)
    with pytest.raises(Refused, match="duplicate field names; give each column a name of its own"):
        read(path)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (b"link,caption,n\nhttp://a,b,1\n", "2.csv has no column 'url'"),
        (b"url,caption,n\nhttp://a,b,x\n", r"2.csv has other types in columns.keep .*\(n: string, not n: int64\)"),
    ],
)
def test_files_of_one_list_have_one_schema(tmp_path: Path, second: bytes, said: str) -> None:
    (tmp_path / "1.csv").write_bytes(b"url,caption,n\nhttp://a,b,1\n")
    (tmp_path / "2.csv").write_bytes(second)
    with pytest.raises(Refused, match=said):
        read(tmp_path, KEEP)


def test_a_list_may_be_in_files_of_several_formats(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_bytes(HEAD + b"http://a,b\n")
    (tmp_path / "2.jsonl").write_bytes(b'{"caption":"d","url":"http://c"}\n')
    (tmp_path / ".3.csv").write_bytes(b"what an editor left")
    (tmp_path / "._1.csv").write_bytes(b"\0\5\x16\7")
    assert read(tmp_path) == ROWS


def test_a_name_that_leads_nowhere_is_told_and_a_link_to_a_list_is_followed(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "a.csv").write_bytes(HEAD + b"http://a,b\nhttp://c,d\n")
    (tmp_path / "link.csv").symlink_to(tmp_path / "lists" / "a.csv")
    (tmp_path / "same").symlink_to(tmp_path / "lists")
    (tmp_path / "dangling.csv").symlink_to(tmp_path / "nowhere.csv")
    (tmp_path / "packed.csv.gz").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.csv")
    assert read(tmp_path / "link.csv") == ROWS
    assert read(f"{tmp_path}/*/**/*.csv") == ROWS  # not twice, though two ways lead there
    for urls, said in (
        (f"{tmp_path}/*.jsonl", r"no file that ends in .* matches"),
        (tmp_path / "dangling.csv", "there is no file or folder"),
        (tmp_path / "pipe.csv", "there is no file or folder"),
        (tmp_path / "packed.csv.gz", r"ends in none of .*; unpack packed\.csv\.gz first"),
    ):
        with pytest.raises(Refused, match=said):
            read(urls)


def test_a_list_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(HEAD + b"".join(f"http://a/{n},b\n".encode() for n in range(5000)))
    how = SourceHow(str(path))
    batches = how.rows(Columns(), how.digests(Columns()))
    next(batches)
    with open(path, "ab") as file:
        file.write(b"http://late,b\n")
    with pytest.raises(Refused, match=r"list\.csv changed while the run was under way"):
        list(batches)
