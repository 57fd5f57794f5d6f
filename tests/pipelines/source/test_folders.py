"""A folder of pictures as a source: captions beside them or in a metadata file, and nothing from outside of it."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import Counter

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from infra.errors import Refused
from infra.records.forgotten import FORGOTTEN, Forgotten, ForgottenNames, add_request, url_salt
from infra.records.objects import object_name
from infra.records.schemas import INDEX
from infra.store.opening import open_store
from pipelines.embed.stage import Embed, EmbedSpec
from pipelines.engine.versions import reconcile
from pipelines.select.stage import FeatureStage, Select
from pipelines.source.columns import columns_of
from pipelines.source.files import Folder, Unreadable
from pipelines.source.stage import SourceHow
from tests.fixtures.samples import caption, gather_of, picture, plain, source_of, table_of, write_folder, write_tar
from tests.fixtures.stages import RULES, clip, make, todo


def taken(store, how: SourceHow, columns=None):
    listed = make(store, source_of(how, columns=columns))
    return listed, make(store, gather_of(how), listed)


def states(store, manifest) -> dict[str, str]:
    return {str(row["url"]): str(row["state"]) for row in table_of(store, manifest, "index.parquet")}


def test_a_folder_a_tar_and_another_tar_give_a_sample_one_uid(tmp_path):
    files = plain(range(20))
    folder = SourceHow(folder=str(write_folder(tmp_path / "folder" / "deep", files).parent))
    one = SourceHow(tars=str(write_tar(tmp_path / "one.tar", files)))
    backwards = [member for seed in reversed(range(20)) for member in plain([seed])]
    other = SourceHow(tars=str(write_tar(tmp_path / "other.tar", backwards)))
    store = open_store(str(tmp_path / "store"))
    found = []
    for how in (folder, one, other):
        _, manifest = taken(store, how)
        assert manifest.states == {"kept": 20}
        columns = ("uid", "caption", "sha256", "width", "height", "state")
        rows = [tuple(row[name] for name in columns) for row in table_of(store, manifest, "index.parquet")]
        found.append(sorted(rows))
    assert found[0] == found[1] == found[2]
    assert len({row[0] for row in found[0]}) == 20


def test_captions_stand_beside_the_pictures_and_strange_files_end_in_their_states(tmp_path):
    (tmp_path / "secret.png").write_bytes(picture(99))
    (tmp_path / "secret.txt").write_text("not to be read")
    folder = write_folder(
        tmp_path / "folder",
        [
            ("a.png", picture(1)),
            ("a.txt", "\ufeffeins \n".encode()),
            ("a/b.c.JPG", picture(2, "JPEG")),
            ("a/b.c.txt", b"zwei"),
            ("bare.png", picture(3)),
            ("latin.png", picture(4)),
            ("latin.txt", "café".encode("latin-1")),
            ("long.png", picture(5)),
            ("long.txt", b"x" * ((1 << 20) + 1)),
            ("captionlink.png", picture(6)),
            ("page.png", b"<html>"),
            ("page.txt", b"a page"),
            (".hidden.png", picture(7)),
            ("notes.md", b"no picture"),
        ],
    )
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "captionlink.txt").symlink_to(tmp_path / "secret.txt")
    os.mkfifo(folder / "pipe.png")
    store = open_store(str(tmp_path / "store"))
    listed, manifest = taken(store, SourceHow(folder=str(folder)))
    assert states(store, manifest) == {
        "a.png": "kept",
        "a/b.c.JPG": "kept",
        "bare.png": "no_caption",
        "captionlink.png": "bad_caption",
        "latin.png": "bad_caption",
        "link.png": "not_a_file",
        "long.png": "bad_caption",
        "page.png": "not_an_image",
        "pipe.png": "not_a_file",
    }
    captions = {row["url"]: row["caption"] for row in table_of(store, listed, "")}
    assert (captions["a.png"], captions["a/b.c.JPG"]) == ("eins", "zwei")
    assert "not to be read" not in captions.values()


def test_what_was_forgotten_is_not_read_and_not_kept(tmp_path):
    folder = write_folder(tmp_path / "folder", plain(range(4)))
    store, how = open_store(str(tmp_path / "store")), SourceHow(folder=str(folder))
    listed = make(store, source_of(how))
    uids = {str(row["url"]): row["uid"] for row in table_of(store, listed, "")}
    sha256 = hashlib.sha256(picture(2)).digest()
    names = ForgottenNames(uids=frozenset({uids["000001.png"]}), pictures=frozenset({sha256}))
    add_request(store, Forgotten.of(names, url_salt(store)))
    (folder / "000001.png").unlink()  # to read it would be refused
    manifest = make(store, gather_of(how), listed)
    rows = table_of(store, manifest, "index.parquet")
    assert {row["uid"]: row["state"] for row in rows} == {
        uids["000000.png"]: "kept",
        uids["000001.png"]: FORGOTTEN,
        uids["000002.png"]: FORGOTTEN,
        uids["000003.png"]: "kept",
    }
    with tarfile.open(store.local(object_name(manifest.only.sha("images.tar")))) as tar:
        held = {name.partition(".")[0] for name in tar.getnames()}
    assert held == {row["uid"].hex() for row in rows if row["state"] == "kept"}


METADATA = {
    "file_name": [
        "1.png",
        "deep/2.png",
        "nowhere.png",
        "../secret.png",
        "/etc/passwd",
        "link/secret.png",
        None,
        "3.png",
    ],
    "text": ["one", "two", "three", "four", "five", "six", "seven", None],
    "views": [1, 2, 3, 4, 5, 6, 7, 8],
}


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_metadata_file_names_the_samples_as_imagefolder_has_it(tmp_path, ending):
    write_folder(tmp_path, [("secret.png", picture(9))])
    pictures = [("1.png", picture(1)), ("deep/2.png", picture(2)), ("3.png", picture(3)), ("unnamed.png", picture(4))]
    folder = write_folder(tmp_path / "folder", pictures)
    (folder / "link").symlink_to(tmp_path)
    rows = pa.table(METADATA)
    if ending == "csv":
        pyarrow.csv.write_csv(rows, folder / "metadata.csv")
    elif ending == "parquet":
        pq.write_table(rows, folder / "metadata.parquet")
    else:
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.to_pylist()))
    store = open_store(str(tmp_path / "store"))
    _, manifest = taken(store, SourceHow(folder=str(folder)), columns_of("imagefolder", {"keep": ("views",)}))
    index = table_of(store, manifest, "index.parquet")
    assert [(row["caption"], row["state"], row["views"]) for row in index] == [
        ("one", "kept", 1),
        ("two", "kept", 2),
        ("three", "no_file", 3),
        ("four", "bad_name", 4),
        ("five", "bad_name", 5),
        ("six", "not_a_file", 6),
        ("seven", "no_image", 7),
        (index[7]["caption"], "no_caption", 8),
    ]


def test_two_metadata_files_are_refused(tmp_path):
    folder = write_folder(tmp_path / "folder", [("metadata.csv", b"file_name,caption\n"), ("metadata.jsonl", b"{}")])
    with pytest.raises(Refused, match=r"metadata.csv and metadata.jsonl"):
        source_of(SourceHow(folder=str(folder)))


def test_a_name_never_leads_out_of_its_folder(tmp_path):
    write_folder(tmp_path, [("in/a.txt", b"a"), ("out.txt", b"out")])
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out.txt")
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    place = Folder(tmp_path / "in")
    assert place.get("a.txt") == b"a"
    for name, state in [
        ("link", "not_a_file"),
        ("up/out.txt", "not_a_file"),
        ("../out.txt", "bad_name"),
        ("./a.txt", "bad_name"),
        ("/etc/passwd", "bad_name"),
        ("a.txt\0.png", "bad_name"),
        ("", "bad_name"),
        ("nowhere/a.txt", "no_file"),
        ("a.txt/b", "not_a_file"),
        ("x" * 300, "no_file"),
    ]:
        with pytest.raises(Unreadable) as refused:
            place.get(name)
        assert refused.value.state == state, name


def test_a_folder_that_is_none_or_changes_under_way_is_refused(tmp_path):
    with pytest.raises(Refused, match=r"source.folder: there is no folder"):
        source_of(SourceHow(folder=str(tmp_path / "nowhere")))
    folder = write_folder(tmp_path / "folder", plain(range(3)))
    how = SourceHow(folder=str(folder))
    stage, store = source_of(how), open_store(str(tmp_path / "store"))
    (folder / "000001.txt").write_text("another caption")
    with pytest.raises(Refused, match="changed while the run"):
        make(store, stage)
    listed = make(store, source_of(how))
    (folder / "000002.png").unlink()
    with pytest.raises(Refused, match="no longer holds what it held"):
        make(store, gather_of(how), listed)
    empty = write_folder(tmp_path / "empty", [("notes.md", b"no picture")])
    with pytest.raises(Refused, match=r"source.folder: .* has no rows"):
        make(store, source_of(SourceHow(folder=str(empty))))


def test_a_folder_in_s3_gives_the_shards_of_the_same_folder_here(tmp_path, s3_uri):
    folder = write_folder(tmp_path / "folder", [*plain(range(4)), ("a-b.png", picture(7)), ("a/c.png", picture(8))])
    bucket = open_store(f"{s3_uri}/data")
    for path in folder.rglob("*.*"):
        bucket.put_new(f"set/{path.relative_to(folder).as_posix()}", path)
    made = []
    for name, how in (("a", SourceHow(folder=str(folder))), ("b", SourceHow(folder=f"{s3_uri}/data/set"))):
        listed, manifest = taken(open_store(str(tmp_path / name)), how)
        made.append((listed.version, manifest.version))
    assert made[0] == made[1]


def test_bytes_do_not_depend_on_how_many_are_read_at_a_time(tmp_path):
    how = SourceHow(folder=str(write_folder(tmp_path / "folder", plain(range(30)))))
    versions = set()
    for threads in (1, 9):
        store = open_store(str(tmp_path / str(threads)))
        versions.add(make(store, gather_of(how, threads=threads), make(store, source_of(how, 10))).version)
    assert len(versions) == 1


def test_what_is_behind_finds_what_it_finds_behind_a_download(tmp_path):
    """From a tar to embeddings: every sample is accounted for, and a run without changes has nothing to do."""
    files = [
        *((name, data) for seed in range(40) for name, data in [*named(seed, 80)]),
        ("bare.png", picture(50, side=80)),
        *named(60, 30),
        *((f"copy.{name.split('.')[1]}", data) for name, data in named(3, 80)),
    ]
    how = SourceHow(tars=str(write_tar(tmp_path / "a.tar", files)))
    store = open_store(str(tmp_path / "store"))
    listed, manifest = taken(store, how)
    looks = make(store, FeatureStage("filter", RULES), manifest)
    chosen = make(store, Select("filter", RULES), looks, manifest)
    model = clip(store)
    embed = Embed(EmbedSpec(base=16))
    embedded = make(store, embed, manifest, chosen, model)
    curate = make(store, Select("curate", ()), make(store, FeatureStage("curate", ()), embedded), embedded)
    account = reconcile(listed, manifest, chosen, embedded, curate)
    assert account["kept"] == 40
    assert account["download.no_caption"] == 1
    assert account["filter.size"] == 1
    assert account["source.duplicate_row"] == 1
    assert Counter(account).total() == 43
    assert todo(store, gather_of(how), listed) == 0
    (record, *_) = manifest.records
    index = pq.read_schema(store.local(f"objects/{record.sha('index.parquet')[:2]}/{record.sha('index.parquet')}"))
    assert index.equals(INDEX)


def named(seed: int, side: int) -> list[tuple[str, bytes]]:
    return [(f"{seed:06d}.png", picture(seed, side=side)), (f"{seed:06d}.txt", caption(seed).encode())]
