"""verify names whatever is not as it was put, tells what was forgotten from what is missing, and mends what it can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import Refused
from infra.records.manifest import Manifest
from infra.records.objects import object_name
from infra.store.base import Store
from infra.store.local import LocalStore
from infra.store.opening import open_store
from pipelines.engine.graph import resolve
from pipelines.engine.ray_shards import perform
from pipelines.versions import verify as data_verify
from pipelines.versions.forget import ForgottenNames, forget
from pipelines.versions.verify import Trouble, mend, verify
from tests.fixtures.chain import Chain, run
from tests.fixtures.stages import Data
from tests.pipelines.engine.test_graph import Double, Numbers

NUMBERS, DOUBLE = Numbers({"numbers": [1, 5, 7]}), Double({})


def done(store: Store) -> tuple[list[Manifest], int]:
    """What a run makes of two stages, and how many actions it does for that."""
    made: list[Manifest] = []
    count = 0
    for stage in (NUMBERS, DOUBLE):
        resolved = resolve(stage, made[-1:], store)
        made.append(resolved.manifest([perform(stage, action, store) for action in resolved.todo]))
        made[-1].save(store)
        count += len(resolved.todo)
    return made, count


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    opened = open_store(str(tmp_path / "store"))
    assert isinstance(opened, LocalStore)
    done(opened)
    return opened


def spoil(store: LocalStore, name: str) -> None:
    path = store.root / name
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])


def remove(store: LocalStore, name: str) -> None:
    store.delete(name)


def kinds(store: LocalStore, manifest: Manifest) -> dict[str, str]:
    """One name of each kind: a file of a shard, a manifest's body and head, a record."""
    version = manifest.version
    return {
        "file": object_name(manifest.records[1].sha("n.json")),
        "body": object_name(version),
        "head": next(entry.name for entry in store.list("manifests/") if version in entry.name),
        "record": next(e.name for e in store.list("records/") if manifest.records[1].key in e.name),
    }


def test_a_whole_store_is_whole(store: LocalStore) -> None:
    found = verify(store)
    assert found.findings == []
    assert found.count == {"manifests": 2, "records": 6, "objects": 8}
    assert found.bytes == sum(entry.bytes for entry in store.list("objects/"))


@pytest.mark.parametrize("harm", [spoil, remove])
@pytest.mark.parametrize("kind", ["file", "body", "head", "record"])
def test_what_is_wrong_is_named_and_mended(
    store: LocalStore, kind: str, harm: Callable[[LocalStore, str], None]
) -> None:
    made, _ = done(store)
    name = kinds(store, made[1])[kind]
    harm(store, name)
    found = verify(store)
    if harm is remove and kind in ("head", "record"):  # is as if it had never been
        assert found.findings == []
    else:
        assert [(one.name, one.trouble is Trouble.MISSING) for one in found.findings] == [(name, harm is remove)]
        assert "double/1" in found.findings[0].where or kind in ("head", "record")
        assert "--mend" in found.findings[0].mend
        mend(store, found)
        assert verify(store).findings == []
    again, count = done(store)
    assert [one.version for one in again] == [one.version for one in made]
    assert count == (1 if kind in ("file", "record") else 0)
    assert verify(store).findings == []
    assert done(store)[1] == 0


def test_what_is_made_anew_as_other_bytes_is_the_next_generation(store: LocalStore, tmp_path: Path) -> None:
    """As with pictures that the network gives another way: the old manifest still names what is lost."""
    made, _ = done(store)
    record = made[1].records[1]
    spoil(store, object_name(record.sha("n.json")))
    found = verify(store)
    data_verify.mend(store, found)
    resolved = resolve(DOUBLE, [made[0]], store)
    (action,) = resolved.todo
    assert action.key == record.key
    with store.scratch() as out:
        from infra.records.commits import commit
        from infra.records.manifest import Record

        (out / "n.json").write_text("other bytes")
        new = commit(store, action, Record.of(action, out, states={"kept": 1}), out)
    assert (new.generation, new.key) == (1, record.key)
    # Killed before its manifest is there: the newest manifest lists generation 0, which must not be taken for this one.
    assert resolve(DOUBLE, [made[0]], store).present[action.key].files == new.files
    resolve(DOUBLE, [made[0]], store).manifest().save(store)
    after = verify(store)
    assert (after.findings, after.lost) == ([], 1)


def test_only_the_versions_that_are_asked_for_are_read(store: LocalStore) -> None:
    made, _ = done(store)
    spoil(store, object_name(made[0].records[0].sha("n.json")))
    assert verify(store, [made[1].version[:12]]).findings == []
    assert len(verify(store, [made[0].version[:12]]).findings) == 1
    with pytest.raises(Refused, match="no version 'abcdefgh'"):
        verify(store, ["abcdefgh"])


def test_memory_holds_pieces_and_not_objects(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(data_verify, "PIECE", 2)
    get = LocalStore.get

    def noted(self: LocalStore, name: str, start: int = 0, length: int | None = None) -> bytes:
        if name.startswith("objects/") and length is not None:
            asked.append(length)
        return get(self, name, start, length)

    monkeypatch.setattr(LocalStore, "get", noted)
    assert verify(store).findings == []
    assert set(asked) == {2}
    assert len(asked) > 100


def test_what_was_forgotten_is_not_missing(chain: Chain, data: Data, tmp_path: Path) -> None:
    own = chain.copy(tmp_path / "store")
    uid = next(iter(own.stays("curate")))
    account = forget(own.store, ForgottenNames(uids=frozenset({uid})))
    found = verify(own.store)
    assert (found.findings, found.forgotten) == ([], account.objects)
    run(own.store, data, own.made["source"])
    assert verify(own.store).findings == []


def test_in_s3(s3_uri: str, tmp_path: Path) -> None:
    remote = open_store(s3_uri)
    made, _ = done(remote)
    name = object_name(made[1].records[0].sha("n.json"))
    remote.delete(name)
    remote.put_new(name, b"other bytes")
    found = verify(remote)
    assert [(one.name, one.trouble) for one in found.findings] == [(name, Trouble.DAMAGED)]
    assert mend(remote, found) == {"double-1": 1}
    assert done(remote)[0][1].version == made[1].version
    assert verify(remote).findings == []
