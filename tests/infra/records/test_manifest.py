"""A record or manifest that is in the store stands for bytes that are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.errors import Refused
from infra.records.commits import commit
from infra.records.manifest import Action, Manifest, Record
from infra.records.objects import object_name
from infra.store.opening import open_store

ACTION = Action("stage/1", {"side": 3}, ())


def test_a_damaged_object_is_refused_before_its_record_is_final(store_uri: str, tmp_path: Path) -> None:
    store = open_store(store_uri)
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_bytes(b"whole")
    record = Record.of(ACTION, out)
    damaged = object_name(record.sha("file"))
    store.put_new(damaged, b"who")
    with pytest.raises(Refused, match=rf"{damaged} .* is damaged: delete it and run again") as caught:
        commit(store, ACTION, record, out)
    assert caught.value.code == 5
    assert not store.exists(ACTION.record_name())
    store.delete(damaged)
    assert commit(store, ACTION, record, out) == record
    assert store.get(damaged) == b"whole"


def test_a_manifest_with_a_damaged_body_gets_no_head(store_uri: str) -> None:
    store = open_store(store_uri)
    manifest = Manifest(ACTION, (Record(ACTION.key, 0, {}),))
    store.put_new(object_name(manifest.version), b"half")
    with pytest.raises(Refused, match="is damaged: delete it and run again"):
        manifest.save(store)
    assert list(store.list("manifests/")) == []
    store.delete(object_name(manifest.version))
    assert Manifest.load(store, manifest.save(store)).records[0].content == manifest.only.content
