"""What MLflow is told arrives once, in the right run, whatever dies in between. Real SQLite, real servers."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from infra.errors import Refused
from infra.mlflow_runs import open_client
from infra.tracking import Tracker
from infra.tracking_uri import check_server, default_uri, spool_folder
from tests.fixtures.mlflow import mlflow_server
from tests.fixtures.s3 import free_port


def runs(uri: str, **tags: str) -> list[Any]:
    """The MLflow runs of all experiments with these tags ("." written as "__")."""
    client = open_client(uri)
    wanted = " and ".join(f"tags.`{name.replace('__', '.')}` = '{value}'" for name, value in tags.items())
    return list(client.search_runs([found.experiment_id for found in client.search_experiments()], wanted))


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of an SQLite database; its tables take seconds to make, so the module shares one."""
    return default_uri(str(tmp_path_factory.mktemp("store")))


@pytest.mark.slow
def test_a_stage_becomes_a_child_run_with_params_metrics_and_artifacts(database: str, tmp_path: Path) -> None:
    tracker = Tracker(database, "unclip", tmp_path, "first", {"unclip.store": "here"})
    tracker.start("prior", {"train": {"steps": 9, "lr": 0.1}, "width": 8, "none": {}}, {"unclip.key": "key of prior"})
    for step in range(1500):
        tracker.metrics("prior", step, {"loss": 1 / (step + 1), "lr": 0.1})
    tracker.artifact("prior", b"a picture", "grids/last.txt")
    tracker.end("prior")
    tracker.end("")
    assert tracker.close(60)
    assert list(tmp_path.iterdir()) == []

    (parent,) = runs(database, unclip__run="first")
    (child,) = runs(database, unclip__key="key of prior")
    client = open_client(database)
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert child.data.params == {"train.steps": "9", "train.lr": "0.1", "width": "8", "none": "{}"}
    history = client.get_metric_history(child.info.run_id, "loss")
    assert {point.step: point.value for point in history} == {step: 1 / (step + 1) for step in range(1500)}
    kept = Path(urlsplit(child.info.artifact_uri).path) / "grids" / "last.txt"
    assert kept.read_bytes() == b"a picture"
    assert kept.is_relative_to(Path(database.removeprefix("sqlite:///")).parent / "artifacts")


def test_a_fit_that_goes_on_goes_on_in_the_same_run(database: str, tmp_path: Path) -> None:
    for step in (1, 2):
        tracker = Tracker(database, "unclip", tmp_path, "second")
        tracker.start("decoder", {"width": 8}, {"unclip.key": "key of decoder"})
        tracker.metrics("decoder", step, {"loss": 1.0})
        tracker.end("decoder", "KILLED" if step == 1 else "FINISHED")
        tracker.end("")
        assert tracker.close(60)
    (child,) = runs(database, unclip__key="key of decoder")
    parents = runs(database, unclip__run="second")
    history = open_client(database).get_metric_history(child.info.run_id, "loss")
    assert [point.step for point in history] == [1, 2]
    assert child.info.status == "FINISHED"
    assert len(parents) == 2
    assert child.data.tags["mlflow.parentRunId"] == max(parents, key=lambda run: run.info.start_time).info.run_id


@pytest.mark.slow
def test_the_run_of_a_killed_driver_goes_on_and_its_last_words_arrive(database: str, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, time; from pathlib import Path; from infra.tracking import Tracker\n"
        "tracker = Tracker(sys.argv[1], 'unclip', Path(sys.argv[2]), 'third')\n"
        "tracker.start('prior', {}, {'unclip.key': 'killed'})\n"
        "tracker.metrics('prior', 1, {'loss': 1.0}); assert tracker.flush(60)\n"
        "tracker.metrics('prior', 2, {'loss': 2.0}); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, database, tmp_path], check=False)
    assert killed.returncode == -signal.SIGKILL
    tracker = Tracker(database, "unclip", tmp_path, "third")
    tracker.start("prior", {}, {"unclip.key": "killed"})
    tracker.metrics("prior", 3, {"loss": 3.0})
    assert tracker.close(60)
    assert len(runs(database, unclip__run="third")) == 1
    (child,) = runs(database, unclip__key="killed")
    history = open_client(database).get_metric_history(child.info.run_id, "loss")
    assert {point.step: point.value for point in history} == {1: 1.0, 2: 2.0, 3: 3.0}
    assert list(tmp_path.iterdir()) == []


def test_what_mlflow_will_never_have_does_not_hold_up_the_rest(database: str, tmp_path: Path) -> None:
    tracker = Tracker(database, "unclip", tmp_path, "fourth")
    tracker.start("prior", {"not/a:*name": 1}, {"unclip.key": "odd"})
    tracker.metrics("prior", 1, {"loss": float("nan"), "fine": 1.0})
    assert tracker.close(60)
    (child,) = runs(database, unclip__key="odd")
    assert child.data.metrics["fine"] == 1.0


@pytest.mark.slow
def test_a_server_that_dies_is_caught_up_when_it_is_back(database: str, tmp_path: Path) -> None:
    port = free_port()
    with mlflow_server(database, port) as uri:
        check_server(uri)
        tracker = Tracker(uri, "served", tmp_path, "fifth")
        tracker.start("prior", {"width": 8}, {"unclip.key": "served"})
        tracker.metrics("prior", 0, {"loss": 0.0})
        assert tracker.flush(60)
    for step in range(1, 200):
        tracker.metrics("prior", step, {"loss": float(step)})
    assert not tracker.flush(3)
    assert tracker.trouble
    with mlflow_server(database, port):
        assert tracker.flush(60)
        assert not tracker.trouble
        tracker.end("prior")
        assert tracker.close(60)
    (child,) = runs(database, unclip__key="served")
    history = open_client(database).get_metric_history(child.info.run_id, "loss")
    assert {point.step: point.value for point in history} == {step: float(step) for step in range(200)}
    assert child.info.status == "FINISHED"


def test_a_server_that_does_not_answer_and_a_uri_of_no_kind_are_refused() -> None:
    began = time.monotonic()
    with pytest.raises(Refused, match=r"MLflow server at http://127\.0\.0\.1:9 does not answer"):
        check_server("http://127.0.0.1:9")
    assert time.monotonic() - began < 6
    for uri in ("./mlruns", "file:///tmp/mlruns"):
        with pytest.raises(Refused, match="use an MLflow server"):
            check_server(uri)
    check_server("sqlite:////anywhere/mlflow.db")


def test_the_default_database_lies_in_the_store_and_for_s3_in_the_users_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert default_uri(str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    in_state = default_uri("s3://bucket/prefix")
    assert in_state.startswith(f"sqlite:///{tmp_path}/state/unclip/")
    assert in_state != default_uri("s3://bucket/other")
    assert in_state == default_uri("s3://bucket/prefix/")
    assert default_uri("s3://bucket") == default_uri("s3://bucket/")
    assert spool_folder("http://host:5000").is_relative_to(tmp_path / "state" / "unclip")
    assert spool_folder(in_state).parent == Path(in_state.removeprefix("sqlite:///")).parent
