"""What a shard of pictures is made of, over a real web server with the web's faults."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from email.message import Message
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from infra.concurrent import map_unordered
from infra.errors import Refused
from infra.records.manifest import Action, Manifest, Record
from infra.records.objects import object_name
from infra.records.schemas import INDEX, KEPT, pair_uid
from infra.store.base import Store
from infra.store.opening import open_store
from pipelines.download.stage import DownloadHow, DownloadSpec, opted_out, user_agent
from pipelines.shapes.links import parse_path
from pipelines.shapes.server import serve
from pipelines.source.stage import Columns
from pipelines.stage import plain
from tests.fixtures.stages import PICTURES, Data, download, make, source

GOLDEN = "c11e05f342"

# What each fault of the world ends in here; "astray" depends on where it leads.
STATES = {
    "missing": "http_404",
    "gone": "http_410",
    "reset": "connection",
    "truncated": "truncated",
    "tiny": "too_small",
    "page": "not_an_image",
    "noai": "opt_out",
}


def indexes(store: Store, manifest: Manifest) -> list[pa.Table]:
    return [pq.read_table(store.local(object_name(one.sha("index.parquet")))) for one in manifest.records]


def listed(store: Store, rows: pa.Table) -> Manifest:
    """A source manifest with one slice of these rows, as the source stage would leave it."""
    action = Action("source/1", {}, ())
    names = [pair_uid(url or "", caption or "") for url, caption in zip(*rows.to_pydict().values(), strict=True)]
    with store.scratch() as out:
        pq.write_table(rows.add_column(0, "uid", pa.array(names, pa.binary(16))), out / "00000.parquet")
        record = Record.of(action, out, states={"listed": rows.num_rows}, facts={"slices": ["00000.parquet"]})
        store.put_new(object_name(record.sha("00000.parquet")), out / "00000.parquet")
    return Manifest(action, (record,))


def test_every_row_of_the_list_ends_in_the_state_of_its_link(data: Data):
    seen = Counter()
    for index in indexes(data.store, data.download):
        for row in index.to_pylist():
            fault = parse_path(urlsplit(row["url"]).path).fault
            expected = ("refused_address", "refused_scheme") if fault == "astray" else (STATES.get(fault, KEPT),)
            assert row["state"] in expected, (row["url"], fault)
            seen[row["state"]] += 1
    assert seen == data.download.states
    assert seen.total() == data.source.states["listed"] == 240
    assert len(seen) > 5


def test_the_index_places_each_kept_picture_in_the_tar(data: Data):
    for record, index in zip(data.download.records, indexes(data.store, data.download), strict=True):
        assert index.schema.equals(INDEX)
        tar = data.store.local(object_name(record.sha("images.tar"))).read_bytes()
        for row in index.to_pylist():
            kept = row["state"] == KEPT
            assert (row["offset"] is not None) == (row["length"] is not None) == kept
            if kept:
                picture = Image.open(io.BytesIO(tar[row["offset"] : row["offset"] + row["length"]]))
                assert (picture.format, *picture.size) == ("PNG", row["width"], row["height"]) == ("PNG", 128, 128)


def test_tars_are_webdatasets_in_list_order_without_times_or_owners(data: Data):
    record, index = data.download.records[0], indexes(data.store, data.download)[0]
    path = data.store.local(object_name(record.sha("images.tar")))
    kept = [row for row in index.to_pylist() if row["state"] == KEPT]
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert [one.name for one in members] == [
            f"{row['uid'].hex()}.{kind}" for row in kept for kind in ("png", "txt", "json")
        ]
        assert {(one.mtime, one.uid, one.gid, one.uname, one.gname) for one in members} == {(0, 0, 0, "", "")}
        assert [one.offset_data for one in members[::3]] == [row["offset"] for row in kept]
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert [sample["txt"].decode() for sample in samples] == [row["caption"] for row in kept]
    facts = json.loads(samples[0]["json"])
    assert facts["url"] == kept[0]["url"]
    assert facts["sha256"] == kept[0]["sha256"].hex()


def test_blocks_are_ranges_that_cover_the_index(data: Data):
    for record in data.download.records:
        first = 0
        for block in record.blocks:
            assert (block.file, block.first) == ("index.parquet", first)
            assert 0 < block.rows <= 256
            first += block.rows
        assert first == record.rows


@pytest.mark.parametrize(
    "how", [{"threads": 1, "retries": 1}, {"threads": 16, "retries": 3, "contact": "me@here.test"}]
)
def test_bytes_do_not_depend_on_how_they_were_fetched(data: Data, tmp_path, how):
    store = open_store(str(tmp_path / "store"))
    with serve(slow=0.0) as other:
        assert other.port != data.server.port
        again = make(store, download(other.port, **how), make(store, source(data.rows)))
    assert again.version == data.download.version


def test_no_address_port_or_agent_is_in_a_shard(data: Data):
    for record in data.download.records:
        for name in record.files:
            content = data.store.local(object_name(record.sha(name))).read_bytes()
            assert f":{data.server.port}".encode() not in content
            assert b"127.0.0.1" not in content
        assert record.facts == {}


def test_fewer_attempts_lose_rows_and_change_no_others(data: Data, tmp_path):
    store = open_store(str(tmp_path / "store"))
    with serve(slow=0.0) as server:
        hasty = make(store, download(server.port, retries=0), make(store, source(data.rows)))
    lost = 0
    for patient, once in zip(indexes(data.store, data.download), indexes(store, hasty), strict=True):
        for before, after in zip(patient.to_pylist(), once.to_pylist(), strict=True):
            if after["state"] == "http_503":
                lost += before["state"] == KEPT
            else:
                moved = {"offset": None}
                assert before | moved == after | moved
    assert lost > 0
    assert hasty.states["http_503"] == lost


def test_rows_without_url_or_caption_are_not_fetched_and_keep_their_place(tmp_path):
    store = open_store(str(tmp_path / "store"))
    with serve() as server:
        good = "http://a.shapes.test/seed0-pairs0-clean/000001.png"
        rows = pa.table({"url": [None, good, " ", good], "caption": ["a", None, "b", " "]})
        manifest = make(store, download(server.port), listed(store, rows))
        assert server.attempts.total() == 0
    (index,) = indexes(store, manifest)
    assert index["state"].to_pylist() == ["no_url", "no_caption", "no_url", "no_caption"]
    assert manifest.rows == 4


def test_kept_columns_are_carried_into_the_index(data: Data, tmp_path):
    store = open_store(str(tmp_path / "store"))
    with serve(slow=0.0) as server:
        slices = make(store, source(data.rows, 1000, columns=Columns(keep=("source",))))
        (index,) = indexes(store, make(store, download(server.port), slices))
    assert index.column_names == [*INDEX.names, "source"]
    assert index["source"].to_pylist() == pq.read_table(data.rows)["source"].to_pylist()


def test_an_outage_is_told_and_nothing_of_it_recorded(data: Data, tmp_path):
    store = open_store(str(tmp_path / "store"))
    with serve() as server:
        port = server.port
    slices = make(store, source(data.rows))
    with pytest.raises(
        Refused, match=r"for any of \d+ rows: \d+ connection, such as \S+\.shapes\.test \(.*refused"
    ) as caught:
        make(store, download(port, retries=0), slices)
    assert caught.value.code == 5
    assert not list(store.list("records/download-1/"))
    assert make(store, download(port, retries=0, silent_rows=0), slices).states == {"connection": 240}


def test_hosts_that_may_not_be_reached_are_fetched_once_they_are_allowed(tmp_path):
    store = open_store(str(tmp_path / "store"))
    with serve() as server:
        path = "seed0-pairs30-clean/{:06d}.png"
        urls = [f"http://127.0.0.1:{server.port}/{path.format(number)}" for number in range(8)]
        slices = listed(store, pa.table({"url": urls, "caption": ["a"] * 8}))
        with pytest.raises(Refused, match=r"8 refused_address, such as 127\.0\.0\.1 .*not public.*download\.allow"):
            make(store, download(server.port), slices)
        # The world answers to its own names alone (421), but it was asked.
        assert make(store, download(server.port, allow=("127.0.0.0/8",)), slices).states == {"http_421": 8}


def test_a_few_dead_hosts_hold_nobody_up(tmp_path):
    store = open_store(str(tmp_path / "store"))
    rows = pa.table({"url": [f"http://127.0.0.1/{number}" for number in range(7)], "caption": ["a"] * 7})
    assert make(store, download(1), listed(store, rows)).states == {"refused_address": 7}


def test_one_answer_is_enough_whatever_it_says(tmp_path):
    store = open_store(str(tmp_path / "store"))
    with serve() as server:
        urls = [
            *(f"http://127.0.0.1/{number}" for number in range(20)),
            "http://a.shapes.test/nowhere",
            "ftp://a.test/",
        ]
        manifest = make(store, download(server.port), listed(store, pa.table({"url": urls, "caption": ["a"] * 22})))
    assert manifest.states == {"http_404": 1, "refused_address": 20, "refused_scheme": 1}


def test_each_slice_is_an_action_of_its_own(data: Data):
    (record,) = data.source.records
    inputs = [action.inputs for action in download(1).actions(data.source)]
    assert inputs == [(record.sha(name),) for name in record.facts["slices"]]
    assert len(inputs) > 2


def test_what_is_blocked_is_in_the_key_and_nothing_is_by_default():
    assert "block" not in plain(DownloadSpec())
    assert plain(DownloadSpec(block=("a.shapes.test",)))["block"] == ["a.shapes.test"]


def test_blocked_rows_are_marked_and_their_hosts_not_asked(data: Data, tmp_path):
    store = open_store(str(tmp_path / "store"))
    spec = replace(PICTURES, block=("a.shapes.test",))
    with serve(slow=0.0) as server:
        manifest = make(store, download(server.port, spec), make(store, source(data.rows)))
        assert server.attempts
    for index in indexes(store, manifest):
        for row in index.to_pylist():
            if "//a.shapes.test" in row["url"]:
                assert row["state"] == "blocked"


def test_results_come_as_they_are_done_and_few_wait():
    started, taken = [], 0
    for position, result in map_unordered(lambda number: started.append(number) or number * 2, range(100), 4):
        assert result == position * 2
        taken += 1
        assert len(started) - taken <= 8
    assert taken == 100


def headers(*values: str) -> Message:
    message = Message()
    for value in values:
        message["X-Robots-Tag"] = value
    return message


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((), False),
        (("noai",), True),
        (("nofollow, NoAI",), True),
        (("nofollow", "noimageai"), True),
        (("unclip: noai",), True),
        (("otherbot: noai",), False),
        (("unavailable_after: 25 Jun 2030 15:00:00 GMT",), False),
        (("nosnippet",), False),
    ],
)
def test_opt_outs_are_obeyed_where_they_are_meant_for_us(values, expected):
    assert opted_out(headers(*values), DownloadSpec().opt_out) is expected


def test_we_say_who_we_are():
    assert user_agent("").startswith("unclip/")
    assert "Mozilla" not in user_agent("")
    assert user_agent("ops@example.test").endswith("; +ops@example.test)")


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 0},
        {"retries": -1},
        {"timeout_s": 0},
        {"allow": ("10.0.0.0/99",)},
        {"contact": "a\r\nX: b"},
        {"silent_rows": -1},
        {"per_host": 0},
        {"give_up": -1},
        {"retry_pass": -1},
        {"retry_states": ("timeout", "opt_out")},
    ],
)
def test_impossible_hows_are_refused(options):
    with pytest.raises(Refused, match="download"):
        DownloadHow(**options)


def test_the_shards_of_version_1_keep_their_bytes(tmp_path):
    store = open_store(str(tmp_path / "store"))
    with serve() as server:
        urls = [f"http://a.shapes.test/seed0-pairs30-clean/{number:06d}.png" for number in range(4)]
        stage = download(server.port, PICTURES)
        manifest = make(store, stage, listed(store, pa.table({"url": urls, "caption": ["a", "b", "c", "d"]})))
    total = hashlib.sha256("".join(manifest.only.sha(name) for name in ("images.tar", "index.parquet")).encode())
    assert (stage.version, total.hexdigest()[:10]) == (1, GOLDEN), "raise Download.version when its bytes change"
