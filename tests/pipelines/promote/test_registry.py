"""MLflow's registry follows the ledger, in a database and on a server, and vouches for its head."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.errors import Refused
from infra.ledger import Entry, Ledger
from infra.records.commits import commit
from infra.records.manifest import Action, Manifest, Record
from infra.store.base import Store
from infra.store.opening import open_store
from infra.tracking.mlflow import open_client
from infra.tracking.uri import default_uri
from pipelines.cli import main as cli
from pipelines.promote import ledger as releases
from pipelines.promote import registry
from tests.fixtures.mlflow import mlflow_server
from tests.fixtures.ports import free_port

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


def released(store: Store, text: str) -> str:
    """The version of a bundle of one small file."""
    action = Action("bundle/1", {"text": text}, ())
    with store.scratch() as out:
        (out / "release.json").write_text(text)
        record = commit(store, action, Record.of(action, out), out)
    return Manifest(action, (record,)).save(store)


@pytest.mark.slow
def test_what_is_done_by_hand_reaches_the_mlflow_that_the_recipe_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = open_store(str(tmp_path / "store"))
    good, bad = released(store, "good"), released(store, "bad")
    named = f"sqlite:///{tmp_path}/a@b/mlflow.db"
    for version in (good, bad):
        append(store, "promote", version)
        registry.mirror(store, "line", named)
    releases.rollback(store, "line", "it draws squares only")
    champion = open_client(named).get_model_version_by_alias("line", "champion")
    assert champion.tags["unclip.release"] == good
    assert "MLflow noted one of them as the head" in releases.verify(store, "line")
    assert not (tmp_path / "store" / "mlflow").exists()


def test_the_environment_goes_before_the_note_and_the_stores_own_database_moves_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = open_store(str(tmp_path / "store"))
    append(store, "promote", FIRST)
    registry.mirror(store, "line", default_uri(store.uri))
    moved = open_store(str((tmp_path / "store").rename(tmp_path / "moved")))
    assert registry.tracking_uri(moved, "line") == registry.tracking_uri(moved) == default_uri(moved.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert registry.tracking_uri(moved, "line") == "http://host:5000"


def test_a_server_that_does_not_answer_is_not_one_that_noted_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "store"))
    append(store, "promote", released(store, "good"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "MLflow has noted no head" in releases.verify(store, "line")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(Refused, match="does not answer"):
        registry.anchor(store, "line")
    said = releases.verify(store, "line")
    assert "does not answer" in said
    assert "has noted no head" not in said


def test_the_pages_of_a_server_are_where_it_serves_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    cli.ui(store=str(tmp_path / "store"))
    assert "http://host:5000" in capsys.readouterr().out


@pytest.mark.slow
def test_a_server_takes_a_folders_releases_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = open_store(str(tmp_path / "store"))
    port = free_port()
    head = append(store, "promote", FIRST)
    assert "not registered now" in registry.mirror(store, "line", f"http://127.0.0.1:{port}")
    with mlflow_server(f"sqlite:///{tmp_path}/server.db", port) as uri:
        with monkeypatch.context() as environment:
            environment.setenv("MLFLOW_TRACKING_URI", uri)
            assert registry.anchor(store, "line") is None
        assert registry.mirror(store, "line", uri) == "model 'line', alias champion"
        assert registry.tracking_uri(store, "line") == uri
        assert registry.anchor(store, "line") == head.digest
        follow(open_store(str(tmp_path / "other")), uri)
