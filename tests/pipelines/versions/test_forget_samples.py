"""`data forget` of samples that came with their pictures: of tars and of a folder, beside runs and gc."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infra.records.forgotten import FORGOTTEN
from infra.records.manifest import Manifest
from infra.records.schemas import KEPT, sample_uid
from infra.store.base import Store
from infra.store.local import LocalStore
from infra.store.opening import open_store
from pipelines.cli.main import app
from pipelines.source.stage import SourceHow
from pipelines.versions import gc
from pipelines.versions.forget import ForgottenNames, forget, names_of
from pipelines.versions.verify import verify
from tests.fixtures.chain import behind, release, traces
from tests.fixtures.samples import caption, gather_of, picture, source_of, table_of, write_folder, write_tar
from tests.fixtures.stages import make

SEEDS = range(24)
GONE = 7
PER_SHARD = 4
shown = partial(picture, side=72)
UID = sample_uid(hashlib.sha256(shown(GONE)).digest(), caption(GONE))


def url(seed: int) -> str:
    return f"https://a.test/{seed}.png"


def tars(folder: Path, seeds: Sequence[int] = SEEDS, name: str = "a.tar") -> SourceHow:
    """A tar of pictures with captions and the addresses that they once had."""
    files = []
    for seed in seeds:
        facts = json.dumps({"url": url(seed)}).encode()
        files += [(f"{seed}.png", shown(seed)), (f"{seed}.txt", caption(seed).encode()), (f"{seed}.json", facts)]
    return SourceHow(tars=str(write_tar(folder / name, files)))


def pictures(folder: Path, seeds: Sequence[int] = SEEDS) -> SourceHow:
    files = [(f"{seed}.png", shown(seed)) for seed in seeds]
    return SourceHow(folder=str(write_folder(folder, [*files, *((f"{s}.txt", caption(s).encode()) for s in seeds)])))


def taken(store: Store, how: SourceHow) -> dict[str, Manifest]:
    """Source and download of a source."""
    source = make(store, source_of(how, PER_SHARD))
    return {"source": source, "download": make(store, gather_of(how), source)}


def named(by: str, folder: Path) -> list[str]:
    """The command's options that name the sample in this way."""
    names = {"url": url(GONE), "uid": UID.hex(), "sha256": hashlib.sha256(shown(GONE)).hexdigest()}
    if by == "file":
        (folder / "names.txt").write_text(f"{names['uid']}\n{names['sha256']}\n")
        return ["--file", str(folder / "names.txt")]
    return [f"--{by}", names[by]]


@pytest.mark.parametrize(("source", "by"), [(tars, "url"), (tars, "uid"), (pictures, "sha256"), (pictures, "file")])
def test_later_versions_lack_it_and_its_releases_are_named(
    tmp_path: Path, source: Callable[[Path], SourceHow], by: str
) -> None:
    store, how = open_store(str(tmp_path / "store")), source(tmp_path / "source")
    before = behind(store, taken(store, how))
    promoted = release(store, before)
    assert len(before["download"].records) > 1
    assert traces(store, UID)
    said = CliRunner().invoke(app, ["data", "forget", *named(by, tmp_path), "--store", store.uri])
    assert said.exit_code == 0, said.output
    assert "1 rows were forgotten: 1 shards were written anew" in said.output
    assert f"trained on 1 of them: release {promoted[:12]} of unclip" in said.output
    assert traces(store, UID) == []
    found = verify(store)
    assert found.findings == []
    assert found.forgotten > 0
    made = behind(store, taken(store, how))
    assert made["source"].version == before["source"].version
    rewritten = [one != other for one, other in zip(before["download"].records, made["download"].records, strict=True)]
    assert sum(rewritten) == 1
    assert made["download"].states == {"kept": len(SEEDS) - 1, FORGOTTEN: 1}
    for stage, file in (("download", "index.parquet"), ("embed", "rows.parquet")):
        uids = [row["uid"] for row in table_of(store, made[stage], file) if row.get("state", KEPT) == KEPT]
        assert UID not in uids
        assert len(uids) == len(SEEDS) - 1
    assert traces(store, UID) == []


def test_a_source_that_is_made_anew_does_not_bring_it_back(tmp_path: Path) -> None:
    """The same picture and caption have one uid wherever they lie; the same picture has one SHA-256."""
    store = open_store(str(tmp_path / "store"))
    taken(store, tars(tmp_path / "first"))
    forget(store, names_of(uids=(UID.hex(),), pictures=(hashlib.sha256(shown(3)).hexdigest(),), urls=(url(5),)))
    copies = write_folder(tmp_path / "copies", [("other.png", shown(3)), ("other.txt", b"said in other words")])
    for how, count in [
        (tars(tmp_path / "second", [*range(30, 40), *reversed(SEEDS)], "renamed.tar"), 3),
        (pictures(tmp_path / "folder"), 3),  # which says no URLs: by the uid of what the URL named
        (SourceHow(folder=str(copies)), 1),
    ]:
        made = taken(store, how)["download"]
        assert made.states[FORGOTTEN] == count
        assert traces(store, UID) == []
    assert forget(store, ForgottenNames()).samples == 0


def test_in_s3_the_same_is_forgotten_as_on_a_disk(tmp_path: Path, s3_uri: str) -> None:
    how = tars(tmp_path / "source")
    bucket = open_store(f"{s3_uri}/tars")
    bucket.put_new("a.tar", Path(str(how.tars)))
    made = []
    for store, where in (
        (open_store(str(tmp_path / "store")), how),
        (open_store(f"{s3_uri}/store"), SourceHow(tars=f"{s3_uri}/tars/a.tar")),
    ):
        taken(store, where)
        account = forget(store, names_of(uids=(UID.hex(),)))
        assert traces(store, UID) == []
        assert verify(store).findings == []
        made.append((account.samples, account.shards, account.objects, taken(store, where)["download"].version))
    assert made[0] == made[1]
    assert made[0][:2] == (1, 1)


def test_a_name_in_a_folder_is_no_url_and_the_refusal_says_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    said = CliRunner().invoke(app, ["data", "forget", "--url", "cats/1.jpg", "--store", str(tmp_path / "store")])
    assert said.exit_code != 0
    assert re.search("--sha256 of its bytes", str(said.exception))


class Meddled(LocalStore):
    """A store in which something else happens, once, right before the n-th write or removal."""

    def __init__(self, root: Path, at: int, what: Callable[[], object]) -> None:
        super().__init__(root)
        for name, value in {"left": at, "what": what}.items():
            object.__setattr__(self, name, value)

    def _meddle(self) -> None:
        object.__setattr__(self, "left", self.left - 1)  # type: ignore[attr-defined]
        if self.left == -1:  # type: ignore[attr-defined]
            self.what()  # type: ignore[attr-defined]

    def put_new(self, name: str, data: bytes | Path) -> bool:
        self._meddle()
        return super().put_new(name, data)

    def delete(self, name: str) -> None:
        self._meddle()
        super().delete(name)


def forgets(store: Store) -> object:
    return forget(store, names_of(uids=(UID.hex(),)))


def collects(store: Store) -> object:
    """A gc that spares nothing for its youth: the worst that it can do."""
    return gc.collect(store, older_s=0, delete=True)


def meddled(
    folder: Path, ours: Callable[[Store], object], theirs: Callable[[Store], object], how: SourceHow, *, begun: bool
) -> int:
    """Does `ours` with `theirs` beside it, before every write of it in turn; returns how many writes there were.

    begun: the source was gathered before.

    Whatever met what: once the list is applied again, the next run ends with the version that lacks the sample, no row
    is lost, and nothing of the sample is left.
    """
    wanted = open_store(str(folder / "wanted"))
    taken(wanted, how)
    forgets(wanted)
    version = taken(wanted, how)["download"].version
    at = 0
    while True:
        root = folder / f"{at}"
        plain = open_store(str(root))
        if begun:
            taken(plain, how)
        store = Meddled(root, at, partial(theirs, plain))
        ours(store)
        done = store.left >= 0  # type: ignore[attr-defined]
        forgets(plain)
        again = taken(plain, how)["download"]
        assert again.version == version, f"before write {at}"
        assert traces(plain, UID) == []
        assert verify(plain).findings == []
        if done:
            return at
        at += 1


def test_beside_a_run_nothing_of_it_is_left(tmp_path: Path) -> None:
    how = pictures(tmp_path / "source", range(4, 13))
    assert meddled(tmp_path, lambda store: taken(store, how), forgets, how, begun=False) > 6


@pytest.mark.slow
def test_beside_gc_nothing_of_it_is_left_and_nothing_else_is_lost(tmp_path: Path) -> None:
    how = pictures(tmp_path / "source", range(4, 13))
    assert meddled(tmp_path / "a", forgets, collects, how, begun=True) > 6
    meddled(tmp_path / "b", collects, forgets, how, begun=True)
