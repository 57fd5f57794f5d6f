"""A store with damaged files: every command says which file, what is wrong and how to mend it, and exits with 5."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import Refused
from infra.ledger import Entry, Ledger
from infra.records.commits import commit
from infra.records.damage import damaged
from infra.records.manifest import Action, Manifest, Record
from infra.records.objects import object_name, read_object
from infra.store.local import LocalStore
from infra.store.opening import open_store
from pipelines.engine.graph import resolve
from pipelines.engine.ray_shards import perform
from pipelines.engine.versions import list_versions
from pipelines.promote import ledger as releases
from pipelines.release.open import open_release
from pipelines.versions import show as data
from tests.pipelines.engine.test_graph import Double, Numbers

NUMBERS = Numbers({"numbers": [1, 2, 3]})
DOUBLE = Double({})


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """Two stages that are done, and a release line of one entry."""
    opened = open_store(str(tmp_path / "store"))
    assert isinstance(opened, LocalStore)
    made: list[Manifest] = []
    for stage in (NUMBERS, DOUBLE):
        resolved = resolve(stage, made, opened)
        made = [resolved.manifest([perform(stage, action, opened) for action in resolved.todo])]
        made[0].save(opened)
    with opened.scratch() as out:
        (out / "release.json").write_text(json.dumps({"schema_version": 1}))
        action = Action("bundle/1", {}, ())
        bundle = Manifest(action, (commit(opened, action, Record.of(action, out), out),))
    Ledger(opened, "unclip").append(Entry("promote", bundle.save(opened)), after=None)
    return opened


def named(store: LocalStore, prefix: str) -> str:
    return next(store.list(prefix)).name


def spoil(store: LocalStore, name: str, how: Callable[[bytes], bytes] = lambda whole: whole[: len(whole) // 2]) -> None:
    path = store.root / name
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(how(whole))


def refused(work: Callable[[], object], name: str, *words: str) -> None:
    with pytest.raises(Refused) as caught:
        work()
    said = str(caught.value)
    assert caught.value.code == 5
    assert said.startswith(name), said
    assert "\n" not in said
    for word in ("delete", *words) if not name.startswith("ledgers") else ("backup", *words):
        assert word in said.lower(), said


def again(store: LocalStore) -> Manifest:
    """What `plan` and `run` read before they do anything."""
    (numbers, double) = (resolve(NUMBERS, [], store), None)
    double = resolve(DOUBLE, [numbers.manifest()], store)
    assert not double.todo
    return double.manifest()


def champion(store: LocalStore) -> str:
    head = Ledger(store, "unclip").head()
    assert head is not None
    return head.release


@pytest.mark.parametrize("how", [lambda whole: whole[:40], lambda _: b"", lambda _: b"[]", lambda _: b"\xff\x00"])
def test_a_cut_head_of_a_manifest(store: LocalStore, how: Callable[[bytes], bytes]) -> None:
    name = named(store, "manifests/double-1/")
    spoil(store, name, how)
    refused(lambda: list(list_versions(store)), name, "run again")
    refused(lambda: again(store), name, "run again")


@pytest.mark.parametrize("how", [lambda whole: whole[:40], lambda whole: whole.replace(b'"double', b'"treble')])
def test_a_damaged_record(store: LocalStore, how: Callable[[bytes], bytes]) -> None:
    for manifest in list(store.list("manifests/double-1/")):
        store.delete(manifest.name)  # else the records are not read, since it holds them
    name = named(store, "records/double-1/")
    spoil(store, name, how)
    refused(lambda: again(store), name, "run again")
    store.delete(name)
    assert len(resolve(DOUBLE, [resolve(NUMBERS, [], store).manifest()], store).todo) == 1


def test_a_manifest_whose_body_is_another(store: LocalStore) -> None:
    version = again(store).version
    body = store.get(object_name(version)).splitlines(keepends=True)
    spoil(store, object_name(version), lambda _: b"".join(reversed(body)))  # each line of it is as good as before
    refused(lambda: Manifest.load(store, version), object_name(version), "sha-256 is another")
    refused(lambda: data.show(store, version), object_name(version))
    refused(lambda: again(store), object_name(version))
    store.delete(object_name(version))
    assert again(store).save(store) == version
    assert Manifest.load(store, version).rows == 3


def test_a_ledger_entry_that_was_cut(store: LocalStore) -> None:
    name = named(store, "ledgers/")
    spoil(store, name)
    for work in (
        lambda: releases.table(store, "unclip"),
        lambda: releases.show(store, "champion"),
        lambda: releases.rollback(store, "unclip", ""),
        lambda: open_release(store, "champion"),
    ):
        refused(work, name)
    with pytest.raises(Refused, match="entry 1") as caught:
        releases.verify(store, "unclip")
    assert caught.value.code == 5


def test_a_release_whose_files_are_missing_or_others(store: LocalStore) -> None:
    document = object_name(Manifest.load(store, champion(store)).only.sha("release.json"))
    spoil(store, document)
    refused(lambda: releases.show(store, "champion"), document, "sha-256 is another")
    store.delete(document)
    refused(lambda: releases.show(store, "champion"), document, "is missing")
    body = object_name(champion(store))
    store.delete(body)
    for work in (lambda: releases.show(store, "champion"), lambda: releases.verify(store, "unclip")):
        refused(work, body, "is missing")


def test_a_stage_that_cannot_read_its_input_says_which_is_damaged(store: LocalStore) -> None:
    (action, *_) = resolve(DOUBLE, [resolve(NUMBERS, [], store).manifest()], store).actions
    name = object_name(action.inputs[0])
    spoil(store, name, lambda _: b"none")
    refused(lambda: perform(DOUBLE, action, store), name, "sha-256 is another")
    store.delete(name)
    refused(lambda: perform(DOUBLE, action, store), name, "is missing")


def test_every_kind_of_name_has_its_way_to_be_mended() -> None:
    assert "backup" in str(damaged("ledgers/unclip/00000001.json", "is missing"))
    assert "run again" in str(damaged("leases/k/00000001.json", "is damaged"))
    with pytest.raises(Refused, match="is missing"):
        read_object(open_store("/nonexistent/store", create=False), "0" * 64)
