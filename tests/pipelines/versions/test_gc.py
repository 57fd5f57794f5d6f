"""gc removes what nothing refers to, and nothing that a run, a release or a killed run's next try needs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from infra.documents import digest
from infra.errors import Refused
from infra.lease import Lease
from infra.ledger import Entry, Ledger
from infra.records.commits import commit
from infra.records.forgotten import ForgottenNames
from infra.records.manifest import Action, Manifest, Record
from infra.records.objects import object_name
from infra.store.base import Store
from infra.store.local import LocalStore
from infra.store.opening import open_store
from pipelines.engine.graph import resolve
from pipelines.engine.ray_shards import perform
from pipelines.engine.versions import list_versions
from pipelines.versions import gc
from pipelines.versions.forget import forget
from pipelines.versions.gc import Garbage, Keep, collect, run_lease
from pipelines.versions.verify import verify
from tests.fixtures.chain import Chain, run
from tests.fixtures.line import put
from tests.fixtures.mortal import Killed, Mortal
from tests.fixtures.stages import Data
from tests.pipelines.engine.test_graph import Double, Numbers

DAYS = 86_400.0


def names(store: Store) -> set[str]:
    return {entry.name for entry in store.list("") if not entry.name.startswith("leases/")}


def age(store: Store, days: float, prefix: str = "") -> None:
    """So many days go by."""
    for entry in store.list(prefix):
        then = entry.modified.timestamp() - days * DAYS
        os.utime(store.local(entry.name), (then, then))


def do(store: Store, numbers: list[int], factor: int | None = None) -> list[Manifest]:
    """Two stages over these numbers, as a run does them."""
    made: list[Manifest] = []
    for stage in (Numbers({"numbers": numbers}), Double({} if factor is None else {"factor": factor})):
        resolved = resolve(stage, made, store)
        made = [*made[:0], resolved.manifest([perform(stage, action, store) for action in resolved.todo])]
        made[0].save(store)
    return made


def whole(store: Store, manifest: Manifest) -> bool:
    return all(store.exists(object_name(file.sha256)) for record in manifest.records for file in record.files.values())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def orphan(store: Store, data: bytes = b"of a killed run") -> str:
    name = object_name(digest(data))
    store.put_new(name, data)
    return name


def test_only_what_nothing_refers_to_goes_and_only_once_it_is_old(store: Store) -> None:
    do(store, [1, 5])
    do(store, [5, 7])
    before = names(store)
    left = orphan(store)
    assert collect(store).young == 1
    assert not collect(store).count
    age(store, 2)
    would = collect(store)
    assert (would.count, would.bytes) == ({"objects": 1}, {"objects": 15})
    assert store.exists(left)
    assert collect(store, delete=True) == would
    assert names(store) == before


def test_a_dry_run_writes_nothing(store: Store) -> None:
    do(store, [1])
    age(store, 2)
    Lease.acquire(store, "a fit's key")
    before = {(entry.name, entry.modified) for entry in store.list("")}
    collect(store, Keep.NEWEST, abandoned=True)
    assert {(entry.name, entry.modified) for entry in store.list("")} == before


def test_the_newest_version_of_each_stage_and_settings_stays(store: Store) -> None:
    do(store, [1, 5])
    age(store, 1)
    other = do(store, [11, 17], factor=3)
    age(store, 1)
    newest = do(store, [5, 7])
    age(store, 2)
    garbage = collect(store, Keep.NEWEST, delete=True)
    assert {head.stage for head in garbage.versions} == {"double/1"}
    assert whole(store, other[0])
    assert whole(store, newest[0])
    assert not resolve(Double({}), [resolve(Numbers({"numbers": [5, 7]}), [], store).manifest()], store).todo


def test_what_a_run_used_lately_stays_though_it_is_not_the_newest(store: Store) -> None:
    do(store, [1, 5])
    age(store, 1)
    do(store, [5, 7])
    age(store, 4)
    again = do(store, [1, 5])  # changes nothing, and needs it
    collect(store, Keep.NEWEST, delete=True)
    assert whole(store, again[0])


def test_a_run_and_a_release_lose_nothing(chain: Chain, data: Data, tmp_path: Path) -> None:
    own = chain.copy(tmp_path / "store")
    age(own.store, 9)
    for keep in Keep:
        collect(own.store, keep, delete=True)
        attempts = data.server.attempts.total()
        made = run(own.store, data, own.made["source"])
        assert {stage: one.version for stage, one in made.items()} == {s: one.version for s, one in own.made.items()}
        assert data.server.attempts.total() == attempts
        for manifest in made.values():
            assert whole(own.store, manifest)
        assert {one.stage for one in list_versions(own.store)} == {one.stage for one in list_versions(chain.store)}


def test_what_a_release_came_from_stays_however_old_it_is(store: Store) -> None:
    released, rolled_back = do(store, [1, 5])[0], do(store, [5, 7])[0]
    ledger = Ledger(store, "unclip")
    for manifest in (rolled_back, released):
        bundle = put(store, "bundle", lambda out: None, manifest.version, facts={"data": manifest.version})
        ledger.append(Entry("promote", bundle.version, facts={"evaluate": manifest.version}), after=ledger.head())
    do(store, [19, 23])
    age(store, 900)
    assert not collect(store, Keep.NEWEST, delete=True).versions
    assert whole(store, released)
    assert whole(store, rolled_back)
    for entry in [*store.list("ledgers/"), *store.list("manifests/bundle-")]:
        store.delete(entry.name)
    gone = collect(store, Keep.NEWEST, delete=True)
    assert {head.version for head in gone.versions} == {released.version, rolled_back.version}
    assert not whole(store, released)


def test_an_unfinished_stage_can_be_finished_unless_it_is_given_up(store: Store) -> None:
    stage = Numbers({"numbers": [1, 2, 3]})
    actions = resolve(stage, [], store).actions
    record = perform(stage, actions[0], store)
    store.put_new(f"checkpoints/{'a' * 64}/000000000010-1/manifest.json", b"{}")
    age(store, 9)
    assert not collect(store, Keep.NEWEST, delete=True).count
    assert resolve(stage, [], store).present == {actions[0].key: record}
    assert set(collect(store, abandoned=True, delete=True).count) == {"records", "objects", "checkpoints"}
    assert names(store) == set()


def test_what_a_live_fit_reads_stays(store: Store) -> None:
    read = do(store, [1, 5])
    age(store, 0.5)
    lease = Lease.acquire(store, "b" * 64)
    assert lease is not None
    age(store, 7)
    lease.renew()  # it goes on, having begun a week ago
    do(store, [5, 7])
    collect(store, Keep.NEWEST, delete=True)
    assert whole(store, read[0])
    lease.release()
    collect(store, Keep.NEWEST, delete=True)
    assert not whole(store, read[0])


def test_a_run_that_puts_an_old_object_again_keeps_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run begins between gc's look at what is referred to and its removal of what is not."""
    left = orphan(store, b"shared bytes")
    age(store, 3)
    marked = gc._mark
    action = Action("late/1", {}, ())

    def late(*arguments: object) -> object:
        found = marked(*arguments)  # type: ignore[arg-type]
        with store.scratch() as out:
            (out / "file").write_bytes(b"shared bytes")
            commit(store, action, Record.of(action, out), out)
        return found

    monkeypatch.setattr(gc, "_mark", late)
    collect(store, delete=True)
    assert store.exists(left)
    assert store.exists(action.record_name())


def test_what_went_in_the_midst_of_a_commit_is_put_back(store: Store) -> None:
    class Hasty(LocalStore):
        """gc removes the object between its put and that of the record."""

        def put_new(self, name: str, data: bytes | Path) -> bool:
            put = super().put_new(name, data)
            if name.startswith("records/"):
                self.delete(left)
            return put

    left = orphan(store, b"shared bytes")
    action = Action("late/1", {}, ())
    with store.scratch() as out:
        (out / "file").write_bytes(b"shared bytes")
        commit(Hasty(Path(store.uri)), action, Record.of(action, out), out)
    assert store.exists(left)


def test_old_versions_and_runs_exclude_each_other(store: Store) -> None:
    do(store, [1])
    with run_lease(store):
        for options in ({"keep": Keep.NEWEST}, {"abandoned": True}):
            with pytest.raises(Refused, match=r"a run on .* is going on") as caught:
                collect(store, delete=True, **options)  # type: ignore[arg-type]
            assert caught.value.code == 4
        collect(store, delete=True)
        collect(store, Keep.NEWEST)
    collect(store, Keep.NEWEST, delete=True)
    removing = Lease.acquire(store, gc.STRICT)
    assert removing is not None
    with pytest.raises(Refused, match="being removed"), run_lease(store):
        pass
    other = Lease.acquire(store, gc.LEASE)
    assert other is not None
    with pytest.raises(Refused, match="another gc"):
        collect(store, delete=True)


def test_killed_at_any_step_nothing_refers_to_what_is_gone_and_the_next_gc_ends_it(tmp_path: Path) -> None:
    def prepared(name: str) -> LocalStore:
        store = open_store(str(tmp_path / name))
        assert isinstance(store, LocalStore)
        do(store, [1, 5])
        age(store, 3)
        do(store, [5, 7])
        orphan(store)
        age(store, 2)
        return store

    def remove(store: Store) -> Garbage:
        return collect(store, Keep.NEWEST, delete=True)

    undisturbed = prepared("undisturbed")
    remove(undisturbed)
    steps = 0
    while True:
        store = prepared(f"killed-{steps}")
        try:
            remove(Mortal(store.root, steps, only="delete"))
            break
        except Killed:
            pass
        for one in list_versions(store):
            assert whole(store, Manifest.load(store, one.version))
        for entry in store.list("records/"):
            files = Record.from_json(store.get(entry.name)).files.values()
            assert all(store.exists(object_name(file.sha256)) for file in files)
        end(store)
        remove(store)
        assert names(store) == names(undisturbed)
        steps += 1
    assert steps >= 4


def end(store: LocalStore) -> None:
    """The leases of a process that was killed are void."""
    for entry in list(store.list("leases/")):
        store.delete(entry.name)


def test_where_a_manifest_is_damaged_nothing_goes(store: Store) -> None:
    made = do(store, [1, 5])
    orphan(store)
    age(store, 2)
    before = names(store) - {object_name(made[0].version)}
    store.delete(object_name(made[0].version))
    with pytest.raises(Refused, match="verify --mend"):
        collect(store, delete=True)
    assert names(store) == before


def test_in_s3_what_is_put_again_is_young_again(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import infra.store.s3

    store = open_store(s3_uri)
    kept = do(store, [1])
    left, used = orphan(store), orphan(store, b"used again")
    time.sleep(2.1)
    monkeypatch.setattr(infra.store.s3, "RENEW_S", 0)
    assert store.put_new(used, b"used again")
    garbage = collect(store, older_s=1.5, delete=True)
    assert garbage.count["objects"] == 1
    assert not store.exists(left)
    assert store.get(used) == b"used again"
    assert whole(store, kept[0])


def test_a_generation_that_no_manifest_lists_yet_stays(chain: Chain, tmp_path: Path) -> None:
    """As after `data forget`, or a later pass over failed rows, before a run lists what they wrote."""
    own = chain.copy(tmp_path / "store")
    row = next(row for row in own.index() if row["state"] == "kept")
    forget(own.store, ForgottenNames(uids=frozenset({row["uid"]})))
    collect(own.store, older_s=0, delete=True)
    assert verify(own.store).findings == []
