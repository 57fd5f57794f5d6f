"""Captions and URLs of a list that are no text: they cost their rows and not the list."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.records.schemas import KEPT
from infra.store.opening import open_store
from pipelines.shapes.server import serve
from pipelines.source.columns import Columns
from pipelines.source.lists import list_digests, rows
from tests.fixtures.stages import download, make, source
from tests.pipelines.download.test_download import indexes

PLACE = b"http://a.shapes.test/seed0-pairs0-clean/"
ROWS = [
    (PLACE + b"000001.png", b"plain"),
    (PLACE + b"000002.png", b"caf\xe9"),
    (PLACE + b"000003.png", "café".encode()),
    (b"http://caf\xe9.test/", b"whose address is none"),
    (PLACE + b"000004.png", b"\xed\xa0\xbd half a character"),
]
EXPECTED = {"plain": KEPT, "café": KEPT, "whose address is none": "no_url", None: "no_caption"}


def write(path: Path) -> Path:
    if path.suffix == ".parquet":  # whose writer trusts that text is UTF-8
        urls, captions = (pa.array(column, pa.binary()).view(pa.string()) for column in zip(*ROWS, strict=True))
        pq.write_table(pa.table({"url": urls, "caption": captions}), path)
    elif path.suffix == ".jsonl":
        path.write_bytes(b"".join(b'{"url": "%s", "caption": "%s"}\n' % row for row in ROWS))
    else:
        between = b"\t" if path.suffix == ".tsv" else b","
        path.write_bytes(b"\n".join(between.join(row) for row in [(b"url", b"caption"), *ROWS]) + b"\n")
    return path


@pytest.mark.parametrize("ending", ["parquet", "csv", "tsv", "jsonl"])
def test_what_is_not_utf8_costs_its_row_and_no_other(tmp_path, ending):
    store = open_store(str(tmp_path / "store"))
    with serve(slow=0.0) as server:
        listed = make(store, source(write(tmp_path / f"list.{ending}")))
        (index,) = indexes(store, make(store, download(server.port), listed))
    assert [(row["caption"], row["state"]) for row in index.to_pylist()] == [
        (caption, EXPECTED[caption]) for caption in ("plain", None, "café", "whose address is none", None)
    ]
    assert listed.states == {"listed": 5}


def test_kept_columns_lose_what_is_not_utf8(tmp_path):
    path = tmp_path / "list.csv"
    path.write_bytes(b"url,caption,site\nhttp://a.test/1,one,Z\xfcrich\nhttp://a.test/2,two,Bern\n")
    (batch,) = rows(str(path), Columns(keep=("site",)), list_digests(str(path)))
    assert batch["site"].to_pylist() == [None, "Bern"]
