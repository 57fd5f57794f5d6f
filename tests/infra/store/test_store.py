"""What every store promises, shown on a folder and on a real S3 server."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infra.errors import NotFound, Refused
from infra.store.local import LocalStore
from infra.store.opening import open_store
from pipelines.cli import main as cli


def test_what_was_put_is_read_back_whole_and_in_part(store_uri: str) -> None:
    store = open_store(store_uri)
    assert store.put_new("a/b.bin", b"0123456789")
    assert store.get("a/b.bin") == b"0123456789"
    assert store.get("a/b.bin", 3) == b"3456789"
    assert store.get("a/b.bin", 3, 4) == b"3456"
    assert store.get("a/b.bin", 8, 99) == b"89"
    assert store.get("a/b.bin", 10) == store.get("a/b.bin", 2, 0) == b""
    assert store.local("a/b.bin").read_bytes() == b"0123456789"


def test_the_first_to_put_a_name_wins_and_its_bytes_stay(store_uri: str, tmp_path: Path) -> None:
    store = open_store(store_uri)
    other = tmp_path / "other"
    other.write_bytes(b"other")
    assert store.put_new("name", b"first")
    assert store.put_new("name", b"first")
    assert not store.put_new("name", b"other")
    assert not store.put_new("name", other)
    other.write_bytes(b"first")
    assert store.put_new("name", other)
    assert store.get("name") == b"first"


def test_a_file_is_put_from_anywhere_and_from_scratch(store_uri: str, tmp_path: Path) -> None:
    store = open_store(store_uri)
    (tmp_path / "file").write_bytes(b"from elsewhere")
    assert store.put_new("elsewhere", tmp_path / "file")
    with store.scratch() as folder:
        (folder / "file").write_bytes(b"from scratch")
        assert store.put_new("scratch", folder / "file")
    assert not folder.exists()
    assert (store.get("elsewhere"), store.get("scratch")) == (b"from elsewhere", b"from scratch")
    (tmp_path / "file").write_bytes(b"changed later")
    assert store.get("elsewhere") == b"from elsewhere"


def test_a_listing_is_sorted_and_by_prefix(store_uri: str) -> None:
    store = open_store(store_uri)
    names = ["a-b/1", "a.b", "a/1", "a/10", "a/2/x", "ab", "b/1"]
    for name in reversed(names):
        store.put_new(name, name.encode())
    for prefix in ("", "a", "a/", "a/1", "a/2/", "b/", "none/"):
        listed = [entry.name for entry in store.list(prefix) if entry.name != "store.json"]
        assert listed == [name for name in names if name.startswith(prefix)]
    (entry,) = store.list("a/10")
    assert entry.bytes == 4
    assert abs(entry.modified - datetime.now(UTC)) < timedelta(minutes=1)


def test_a_missing_name_is_named(store_uri: str) -> None:
    store = open_store(store_uri)
    for read in (store.get, store.local):
        with pytest.raises(NotFound, match="no/such is not in the store") as raised:
            read("no/such")
        assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    assert not store.exists("no/such")
    store.delete("no/such")


def test_a_deleted_name_is_free_again(store_uri: str) -> None:
    store = open_store(store_uri)
    store.put_new("a/name", b"one")
    assert store.local("a/name").read_bytes() == b"one"
    store.delete("a/name")
    assert not store.exists("a/name")
    assert store.put_new("a/name", b"two")
    assert store.local("a/name").read_bytes() == b"two"


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../b", "a//b", "a/", "", ".", "a\\b", "a\0b", "tmp/x"])
def test_names_that_could_leave_the_store_are_refused(tmp_path: Path, name: str) -> None:
    store = open_store(str(tmp_path))
    with pytest.raises(Refused, match="no name for a store"):
        store.put_new(name, b"")
    with pytest.raises(Refused, match="no name for a store"):
        store.get(name)


def test_a_store_travels_to_another_process(store_uri: str) -> None:
    store = open_store(store_uri)
    store.put_new("name", b"bytes")
    assert b"secret" not in pickle.dumps(store)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(store.get, ("name",)) == b"bytes"
    assert open_store(store.uri) == store


def _put_my_number(store: object, start: object, number: int, answers: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    won = [name for name in range(40) if store.put_new(f"race/{name}", b"%d" % number * 1000)]  # type: ignore[attr-defined]
    answers.put((number, won))  # type: ignore[attr-defined]


@pytest.mark.slow
def test_of_processes_that_race_for_a_name_just_one_wins(store_uri: str) -> None:
    store = open_store(store_uri)
    spawn = multiprocessing.get_context("spawn")
    start, answers = spawn.Barrier(4), spawn.Queue()
    racers = [spawn.Process(target=_put_my_number, args=(store, start, n, answers)) for n in range(4)]
    for racer in racers:
        racer.start()
    won = dict(answers.get(timeout=60) for _ in racers)
    for racer in racers:
        racer.join()
    assert sorted(name for names in won.values() for name in names) == list(range(40))
    for number, names in won.items():
        assert all(store.get(f"race/{name}") == b"%d" % number * 1000 for name in names)


def test_a_store_that_does_not_exist_is_looked_at_without_being_made(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "none" / "yet"), create=False)
    assert list(store.list("")) == list(store.list("records/embed-1/")) == []
    assert not store.exists("a")
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_a_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for create in (True, False):
        with pytest.raises(Refused, match="is not a folder"):
            open_store(str(tmp_path / "file"), create=create)
    for folder in (tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises(Refused, match="is not writable"):
            open_store(str(folder))
    with pytest.raises(Refused, match="unknown scheme 'ftp'"):
        open_store("ftp://host/path")


def test_stored_files_are_read_only_and_dated_by_their_putting(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with store.scratch() as folder:
        (folder / "old").write_bytes(b"x")
        os.utime(folder / "old", (0, 0))
        store.put_new("old", folder / "old")
    assert not store.local("old").stat().st_mode & 0o222
    (entry,) = store.list("")
    assert datetime.now(UTC) - entry.modified < timedelta(minutes=1)


def test_what_a_killed_writer_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert isinstance(store, LocalStore)
    script = (
        "import os, signal; from infra.store.opening import open_store\n"
        f"with open_store({str(tmp_path)!r}).scratch() as folder:\n"
        "    (folder / 'half').write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    with store.scratch() as alive:
        (alive / "file").write_bytes(b"x")
        assert len(list((tmp_path / "tmp").iterdir())) == 2
        open_store(str(tmp_path))
        assert list((tmp_path / "tmp").iterdir()) == [alive]
        assert (alive / "file").read_bytes() == b"x"


def test_every_command_that_a_message_advises_exists() -> None:
    groups = {"data": cli.data, "releases": cli.releases}
    known = {f"{group} {command.name}" for group, app in groups.items() for command in app.registered_commands}
    sources = "".join(
        path.read_text()
        for floor in ("infra", "pipelines", "training")
        for path in (Path(__file__).parents[3] / floor).rglob("*.py")
    )
    advised = set(re.findall(r"unclip ((?:data|releases) [a-z]+)", sources))
    assert advised
    assert advised <= known


def test_what_is_put_again_is_young_again(store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import infra.store.s3

    monkeypatch.setattr(infra.store.s3, "RENEW_S", 0)
    store = open_store(store_uri)
    store.put_new("a/name", b"bytes")
    (before,) = store.list("a/name")
    time.sleep(1.1)  # S3 counts whole seconds
    assert not store.put_new("a/name", b"others")
    assert list(store.list("a/name")) == [before]
    assert store.put_new("a/name", b"bytes")
    (after,) = store.list("a/name")
    assert after.modified > before.modified
    assert store.get("a/name") == b"bytes"
