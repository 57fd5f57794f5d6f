"""How lists are read and cut."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import Refused
from infra.records.objects import object_name
from infra.records.schemas import pair_uid
from infra.store.opening import open_store
from pipelines.source.columns import Columns
from pipelines.source.cut import cut, slices
from pipelines.source.lists import check_columns, list_digests
from pipelines.source.stage import Source, SourceHow, SourceSpec
from tests.fixtures.stages import make, source, todo

GOLDEN = "8c037a446e"


def table(rows: int, start: int = 0) -> pa.Table:
    numbers = range(start, start + rows)
    return pa.table(
        {
            "url": [f"http://a.test/{number}.png" for number in numbers],
            "caption": [f"picture {number}" for number in numbers],
            "views": pa.array(numbers, pa.int64()),
        }
    )


def names(seed: int, rows: int) -> list[bytes]:
    return [hashlib.sha256(f"{seed} {row}".encode()).digest()[:16] for row in range(rows)]


def pieces(uids: list[bytes], rows_per_shard: int) -> list[tuple[bytes, ...]]:
    out, start = [], 0
    for size in cut(iter(uids), rows_per_shard):
        out.append(tuple(uids[start : start + size]))
        start += size
    assert start == len(uids)
    return out


def look(urls: str, columns: Columns) -> None:
    """What is read of a list before a run."""
    list_digests(urls)
    check_columns(urls, columns)


def touched(before: list[tuple[bytes, ...]], after: list[tuple[bytes, ...]]) -> tuple[int, int]:
    """Successive slices of each that are not common, from the first difference to the last."""
    head = 0
    while head < min(len(before), len(after)) and before[head] == after[head]:
        head += 1
    tail = 0
    while tail < min(len(before), len(after)) - head and before[-1 - tail] == after[-1 - tail]:
        tail += 1
    return len(before) - head - tail, len(after) - head - tail


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 400), st.integers(1, 40), st.floats(0, 1))
def test_one_row_more_or_less_touches_its_slice_and_at_most_its_neighbours(seed, rows, rows_per_shard, where):
    without = names(seed, rows)
    at = round(where * rows)
    within = [*without[:at], pair_uid("http://new.test", str(seed)), *without[at:]]
    old, new = touched(pieces(without, rows_per_shard), pieces(within, rows_per_shard))
    assert old <= 3
    assert new <= 3


def test_most_rows_touch_one_slice_alone():
    without = names(7, 2000)
    before = pieces(without, 100)
    alone = 0
    for at in range(0, 2000, 20):
        after = pieces([*without[:at], pair_uid("http://new.test", str(at)), *without[at:]], 100)
        alone += touched(before, after) == (1, 1)
    assert alone >= 90


@settings(max_examples=200, deadline=None)
@given(
    st.integers(4, 60),
    st.integers(0, 900),
    st.sampled_from(["random", "equal", "rising", "falling", "saw"]),
)
def test_slices_have_between_a_quarter_and_four_times_the_rows(rows_per_shard, rows, order):
    uids = names(1, rows)
    if order == "equal":
        uids = uids[:1] * rows
    elif order == "saw":
        uids = [number.to_bytes(16, "big") for number in (row % (rows_per_shard // 4) for row in range(rows))]
    elif order != "random":
        uids = sorted(uids, reverse=order == "falling")
    sizes = [len(piece) for piece in pieces(uids, rows_per_shard)]
    assert all(size <= 4 * rows_per_shard for size in sizes)
    if len(sizes) > 1:
        assert min(sizes) >= rows_per_shard // 4


def test_slices_have_the_rows_asked_for_on_average():
    sizes = [len(piece) for piece in pieces(names(3, 50_000), 100)]
    assert 90 < sum(sizes) / len(sizes) < 110


def test_slices_hold_every_row_in_list_order_however_the_list_comes_in_batches():
    rows = table(500).add_column(
        0, "uid", pa.array([pair_uid(f"http://a.test/{n}.png", f"picture {n}") for n in range(500)])
    )
    whole = list(slices(rows.to_batches(), 40))
    parts = list(slices(rows.to_batches(max_chunksize=7), 40))
    assert len(whole) > 5
    assert [one.num_rows for one in whole] == [one.num_rows for one in parts]
    assert pa.concat_tables(parts).equals(pa.concat_tables(whole))
    assert pa.concat_tables(whole).equals(rows)


def test_an_inserted_row_leaves_the_other_shards_to_downloads_as_they_are(tmp_path):
    store = open_store(str(tmp_path / "store"))
    pq.write_table(table(600), tmp_path / "list.parquet")
    before = make(store, source(tmp_path / "list.parquet", 50)).only
    rows = pa.concat_tables([table(300), table(1, 9999), table(300, 300)])
    pq.write_table(rows, tmp_path / "list.parquet")
    after = make(store, source(tmp_path / "list.parquet", 50)).only
    old, new = ({record.sha(name) for name in record.facts["slices"]} for record in (before, after))
    assert 1 <= len(new - old) <= 3
    assert after.rows == 601


def test_every_format_gives_the_same_slices(tmp_path):
    rows = table(120)
    pq.write_table(rows, tmp_path / "a.parquet")
    pyarrow.csv.write_csv(rows, tmp_path / "b.csv")
    pyarrow.csv.write_csv(rows, tmp_path / "c.tsv", pyarrow.csv.WriteOptions(delimiter="\t"))
    (tmp_path / "d.jsonl").write_text(rows.to_pandas().to_json(orient="records", lines=True))
    made = []
    for path in sorted(tmp_path.glob("?.*")):
        store = open_store(str(tmp_path / f"store-{path.suffix[1:]}"))
        made.append(make(store, source(path, 30, columns=Columns(keep=("views",)))).only.files)
    assert made[0] == made[1] == made[2] == made[3]
    assert len(made[0]) > 2


def test_a_folder_is_one_list_in_the_order_of_its_names(tmp_path):
    (tmp_path / "lists").mkdir()
    pq.write_table(table(40, 40), tmp_path / "lists" / "2.parquet")
    pq.write_table(table(40), tmp_path / "lists" / "1.parquet")
    (tmp_path / "lists" / "readme.txt").write_text("not a list")
    store = open_store(str(tmp_path / "store"))
    record = make(store, source(tmp_path / "lists", 200)).only
    got = pq.read_table(store.local(object_name(record.sha("00000.parquet"))))
    assert got["url"].to_pylist() == table(80)["url"].to_pylist()


def test_a_glob_is_one_list_in_the_order_of_its_names(tmp_path, s3_uri):
    bucket = open_store(f"{s3_uri}/lists")
    for number, name in enumerate(["a/part-0.parquet", "a/part-1.parquet", "b/deep/part-2.parquet", "b/other.parquet"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table(40, 40 * number), tmp_path / name)
        bucket.put_new(name, tmp_path / name)
    (tmp_path / "a" / "part-9.txt").write_text("not a list")
    for pattern, lists in [
        ("a/part-*.parquet", (0, 1)),
        ("a/part-?.*", (0, 1)),
        ("a/part-[1-9].parquet", (1,)),
        ("*/*.parquet", (0, 1, 3)),
        ("**/part-*.parquet", (0, 1, 2)),
        ("b/**/*.parquet", (2, 3)),
    ]:
        found = []
        for urls in (f"{tmp_path}/{pattern}", f"{s3_uri}/lists/{pattern}"):
            how = SourceHow(urls)
            batches = how.rows(Columns(), how.digests(Columns()))
            found.append([name for batch in batches for name in batch["url"].to_pylist()])
        assert found[0] == found[1] == [name for n in lists for name in table(40, 40 * n)["url"].to_pylist()], pattern
    for urls in (f"{tmp_path}/a/*.csv", f"{s3_uri}/lists/a/*.csv"):
        with pytest.raises(Refused, match="that ends in"):
            list_digests(urls)
    (tmp_path / "[1]").mkdir()
    pq.write_table(table(1), tmp_path / "[1]" / "list.parquet")
    assert len(list_digests(str(tmp_path / "[1]"))) == 1


READ = """
import resource, sys
from pathlib import Path
from infra.store.opening import open_store
from pipelines.source.stage import Source, SourceHow, SourceSpec
peaks = []
for number, path in enumerate(sys.argv[2:]):
    how, spec = SourceHow(path), SourceSpec(rows_per_shard=200)
    stage = Source(spec, how, how.digests(spec.columns))
    out = Path(sys.argv[1], str(number))
    out.mkdir()
    (action,) = stage.actions()
    rows = stage.run(action, open_store(sys.argv[1] + "/store"), out).rows
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
print(rows, *peaks)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_list_ten_times_as_long_is_read_in_the_same_memory(tmp_path, ending):
    """Of 100 MB, a list's reader holds but a few more than of 10 MB."""
    letters = np.random.default_rng(0).integers(97, 123, 10_000_000, np.uint8).tobytes().decode()
    files = []
    for rows in (2_500, 25_000):
        files.append(tmp_path / f"{rows}.{ending}")
        captions = [letters[(one := 331 * row % 9_990_000) : one + 4000] for row in range(rows)]
        if ending == "parquet":
            listed = pa.table({"url": [str(row) for row in range(rows)], "caption": captions})
            pq.write_table(listed, files[-1], use_dictionary=False, compression="none")  # one row group
        elif ending == "csv":
            with open(files[-1], "w") as file:
                file.write("url,caption\n")
                file.writelines(f"{row},{caption}\n" for row, caption in enumerate(captions))
        else:
            with open(files[-1], "w") as file:
                file.writelines(f'{{"url": "{row}", "caption": "{text}"}}\n' for row, text in enumerate(captions))
    assert files[1].stat().st_size > 95 << 20
    command = [sys.executable, "-c", READ, str(tmp_path), *map(str, files)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert run.returncode == 0, run.stderr
    rows, short, long = map(int, run.stdout.split())
    assert rows == 25_000
    assert long - short < 32, f"{short} MB, {long} MB"


def test_rows_are_named_by_url_and_caption_and_kept_columns_follow(tmp_path):
    dictionary = table(3).set_column(2, "tag", pa.array(["x", "y", None]).dictionary_encode())
    pq.write_table(dictionary.rename_columns(["link", "text", "tag"]), tmp_path / "list.parquet")
    store = open_store(str(tmp_path / "store"))
    columns = Columns(url="link", caption="text", keep=("tag",))
    record = make(store, source(tmp_path / "list.parquet", columns=columns)).only
    got = pq.read_table(store.local(object_name(record.sha("00000.parquet"))))
    assert got.column_names == ["uid", "url", "caption", "tag"]
    assert got["uid"].to_pylist()[1] == hashlib.sha256(b"http://a.test/1.png\0picture 1").digest()[:16]
    assert got["tag"].to_pylist() == ["x", "y", None]


def test_null_rows_are_listed_and_repeated_rows_are_counted(tmp_path):
    rows = pa.table(
        {"url": ["http://a.test/1", None, "http://a.test/1", "http://a.test/1"], "caption": ["a", "b", "a", None]}
    )
    pq.write_table(rows, tmp_path / "list.parquet")
    store = open_store(str(tmp_path / "store"))
    record = make(store, source(tmp_path / "list.parquet")).only
    got = pq.read_table(store.local(object_name(record.sha("00000.parquet"))))
    assert record.states == {"listed": 3, "duplicate_row": 1}
    assert got["url"].to_pylist() == ["http://a.test/1", None, "http://a.test/1"]
    assert got["caption"].to_pylist() == ["a", "b", None]
    assert len(set(got["uid"].to_pylist())) == 3


def test_a_list_that_comes_twice_gives_each_slice_once(tmp_path):
    (tmp_path / "lists").mkdir()
    for name in ("1.parquet", "2.parquet"):
        pq.write_table(table(600), tmp_path / "lists" / name)
    store = open_store(str(tmp_path / "store"))
    record = make(store, source(tmp_path / "lists", 30)).only
    shas = [record.sha(name) for name in record.facts["slices"]]
    assert len(set(shas)) == len(shas)
    assert record.rows == 1200
    assert record.states["duplicate_row"] > 400


def test_the_same_list_is_cut_once(tmp_path):
    pq.write_table(table(100), tmp_path / "list.parquet")
    store = open_store(str(tmp_path / "store"))
    make(store, source(tmp_path / "list.parquet"))
    (tmp_path / "list.parquet").rename(tmp_path / "moved.parquet")
    assert todo(store, source(tmp_path / "moved.parquet")) == 0


def test_a_list_in_s3_gives_the_slices_of_the_same_list_in_a_file(tmp_path, s3_uri):
    pq.write_table(table(200), tmp_path / "list.parquet")
    bucket = open_store(f"{s3_uri}/lists")
    bucket.put_new("list.parquet", tmp_path / "list.parquet")
    bucket.put_new("notes.txt", b"not a list")
    here = source(tmp_path / "list.parquet")
    local = make(open_store(str(tmp_path / "local")), here).only
    for urls in (f"{s3_uri}/lists", f"{s3_uri}/lists/list.parquet"):
        assert list_digests(urls) == here.digests
        there = Source(here.spec, SourceHow(urls), list_digests(urls))
        out = tmp_path / urls.replace("/", "_")
        out.mkdir()
        (action,) = there.actions()
        assert there.run(action, open_store(str(tmp_path / "local")), out).files == local.files
    with pytest.raises(Refused, match="no object that ends in"):
        list_digests(f"{s3_uri}/elsewhere")


@pytest.mark.parametrize(
    ("content", "name", "columns", "message"),
    [
        (None, "nowhere.parquet", Columns(), "no file or folder"),
        (b"x", "list.txt", Columns(), "ends in none of"),
        (b"no parquet", "list.parquet", Columns(), "cannot be read as parquet"),
        (b"", "list.csv", Columns(), "cannot be read as csv"),
        (b"link,text\nhttp://a,b\n", "list.csv", Columns(), "no column 'url'. Its columns: link, text"),
        (b"url,text\nhttp://a,b\n", "list.csv", Columns(), "no column 'caption'"),
        (
            b"url,caption\nhttp://a,b\n",
            "list.csv",
            Columns(keep=("tag",)),
            "columns.keep: list.csv has no column 'tag'",
        ),
        (b'{"url": 5, "caption": "b"}\n', "list.jsonl", Columns(), "column 'url' of list.jsonl holds int64, not text"),
    ],
)
def test_lists_that_cannot_be_read_are_refused_with_what_there_is(tmp_path, content, name, columns, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Refused, match=message) as refused:
        look(str(path), columns)
    assert refused.value.code == 2
    assert "\n" not in str(refused.value)


def test_a_list_without_rows_is_refused(tmp_path):
    pq.write_table(table(0), tmp_path / "list.parquet")
    with pytest.raises(Refused, match="has no rows"):
        make(open_store(str(tmp_path / "store")), source(tmp_path / "list.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match="no file that ends in"):
        list_digests(str(tmp_path / "empty"))


def test_a_list_that_changes_under_way_is_refused(tmp_path):
    pq.write_table(table(10), tmp_path / "list.parquet")
    stage = source(tmp_path / "list.parquet")
    pq.write_table(table(11), tmp_path / "list.parquet")
    with pytest.raises(Refused, match="changed while the run"):
        make(open_store(str(tmp_path / "store")), stage)


def test_impossible_specs_are_refused():
    with pytest.raises(Refused, match="at least 1"):
        SourceSpec(rows_per_shard=0)
    with pytest.raises(Refused, match="unclip's own columns"):
        Columns(keep=("state",))
    with pytest.raises(Refused, match="twice"):
        Columns(url="text", caption="text")


def test_the_slices_of_version_1_keep_their_bytes(tmp_path):
    pq.write_table(table(300), tmp_path / "list.parquet")
    stage = source(tmp_path / "list.parquet", 50)
    record = make(open_store(str(tmp_path / "store")), stage).only
    total = hashlib.sha256("".join(record.sha(name) for name in record.facts["slices"]).encode()).hexdigest()
    assert (stage.version, total[:10]) == (1, GOLDEN), "raise Source.version when its bytes change"
