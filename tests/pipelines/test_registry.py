"""MLflow's registry follows the ledger, in a database and on a server, and vouches for its head."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.errors import Refused
from infra.ledger import Entry, Ledger
from infra.store import Store, open_store
from infra.tracking import default_uri, open_client
from pipelines import registry
from tests.fixtures.mlflow import mlflow_server
from tests.fixtures.s3 import free_port

FIRST, SECOND = "a1" * 32, "b2" * 32


def append(store: Store, kind: str, release: str) -> Entry:
    ledger = Ledger(store, "line")
    return ledger.append(Entry(kind, release, reason="because", facts={"scores": {"single.all": 0.5}}), ledger.head())


def follow(store: Store, uri: str) -> None:
    """The facts that hold wherever the registry lies."""
    client = open_client(uri)
    for kind, release, versions in (("promote", FIRST, 1), ("promote", SECOND, 2), ("rollback", FIRST, 2)):
        head = append(store, kind, release)
        for _ in range(2):
            assert registry.mirror(store, "line", uri) == "model 'line', alias champion"
        champion = client.get_model_version_by_alias("line", "champion")
        assert champion.tags["unclip.release"] == release
        assert champion.tags["unclip.ledger.head"] == head.digest
        assert champion.tags["score.single.all"] == "0.5"
        assert champion.source.endswith(f"/objects/{release[:2]}/{release}")
        assert len(client.search_model_versions("name = 'line'")) == versions


def test_the_alias_follows_promotions_and_rollbacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = open_store(str(tmp_path / "store"))
    assert registry.anchor(store, "line") is None
    assert not (tmp_path / "store" / "mlflow").exists()
    assert "no release" in registry.mirror(store, "line", default_uri(store.uri))
    follow(store, default_uri(store.uri))
    head = Ledger(store, "line").head()
    assert head is not None
    assert registry.anchor(store, "line") == head.digest
    store.delete("ledgers/line/00000003.json")
    with pytest.raises(Refused, match="its end was cut off"):
        Ledger(store, "line").verify(registry.anchor(store, "line") or "")


@pytest.mark.slow
def test_a_server_takes_a_folders_releases_too(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    port = free_port()
    append(store, "promote", FIRST)
    assert "not registered now" in registry.mirror(store, "line", f"http://127.0.0.1:{port}")
    with mlflow_server(f"sqlite:///{tmp_path}/server.db", port) as uri:
        assert registry.mirror(store, "line", uri) == "model 'line', alias champion"
        follow(open_store(str(tmp_path / "other")), uri)
