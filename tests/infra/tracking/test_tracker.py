"""What MLflow is told arrives once, in the right run, whatever dies in between. Real SQLite, real servers."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from infra.errors import Refused
from infra.tracking.mlflow import open_client
from infra.tracking.tracker import DataSet, Tracker
from infra.tracking.uri import check_server, default_uri, spool_folder
from tests.fixtures.disk import Disk


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
        "import os, signal, sys, time; from pathlib import Path; from infra.tracking.tracker import Tracker\n"
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


def test_tags_data_sets_and_pictures_arrive_and_a_picture_drawn_again_is_there_once(
    database: str, tmp_path: Path
) -> None:
    import mlflow.data

    version, buffer = "0123456789abcdef" * 4, io.BytesIO()
    Image.new("RGB", (6, 4), "red").save(buffer, "png")
    rows = DataSet("embed", version, "/store/objects/01/0123", "rows", {"rows": 3, "states": {"kept": 3}})
    for _ in range(2):  # a fit that went on
        tracker = Tracker(database, "unclip", tmp_path, "sixth")
        tracker.start("decoder", {}, {"unclip.key": "seen"}, [rows])
        tracker.tag("decoder", {"unclip.checkpoint": "digest", "unclip.key": "seen"})
        tracker.tag("", {"mlflow.user": "me"})
        for step in (5, 10):
            tracker.image("decoder", buffer.getvalue(), "preview", step)
        assert tracker.close(60)
    (child,) = runs(database, unclip__key="seen")
    assert child.data.tags["unclip.checkpoint"] == "digest"
    assert runs(database, unclip__run="sixth")[0].data.tags["mlflow.user"] == "me"
    (found,) = child.inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("embed", version[:36])
    assert json.loads(found.dataset.profile) == rows.profile
    assert mlflow.data.get_source(found).uri == rows.uri
    assert {tag.key: tag.value for tag in found.tags} == {"mlflow.data.context": "rows", "version": version}
    pictures = sorted((Path(urlsplit(child.info.artifact_uri).path) / "images").glob("*.png"))
    assert sorted(path.name.split("+")[:3] for path in pictures) == [
        ["preview", "step", "10"],
        ["preview", "step", "5"],
    ]
    with Image.open(pictures[0]) as picture:
        assert (picture.size, picture.getpixel((0, 0))) == ((6, 4), (255, 0, 0))


def test_a_file_that_mlflow_cannot_keep_does_not_hold_up_the_rest(database: str, tmp_path: Path) -> None:
    tracker = Tracker(database, "unclip", tmp_path, "seventh")
    tracker.start("decoder", {}, {"unclip.key": "closed"})
    assert tracker.flush(60)
    (child,) = runs(database, unclip__key="closed")
    folder = Path(urlsplit(child.info.artifact_uri).path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("no folder can be made here")
    tracker.artifact("decoder", b"text", "captions.txt")
    tracker.metrics("decoder", 1, {"loss": 1.0})
    assert tracker.close(60)
    assert runs(database, unclip__key="closed")[0].data.metrics == {"loss": 1.0}
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_stops_nobody_and_what_could_not_be_written_is_told_later(
    database: str, disk: Disk, caplog: Any
) -> None:
    tracker = Tracker(database, "unclip", disk.root / "spool", "crowded", {"unclip.store": "crowded"})
    tracker.start("prior", {"width": 8}, {"unclip.key": "crowded prior"})
    tracker.metrics("prior", 0, {"loss": 9.0})
    assert tracker.flush(60)
    disk.fill(leave=0)
    tracker.artifact("prior", bytes(100_000), "grid.png")
    for step in range(1, 400):  # more than the file's last page has room for
        tracker.metrics("prior", step, {"loss": 1 / step, "gradient_norm": 1.0})
    assert "No space left on device" in tracker.trouble
    assert [record.message.partition(" (")[0] for record in caplog.records if "grid" in record.message] == [
        "grid.png is not kept for MLflow"
    ]
    disk.free()
    tracker.end("prior")
    assert tracker.close(60)
    assert not tracker.trouble
    assert list((disk.root / "spool").iterdir()) == []
    (child,) = runs(database, unclip__key="crowded prior")
    history = open_client(database).get_metric_history(child.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(0, 9.0), *((n, 1 / n) for n in range(1, 400))]
    assert child.info.status == "FINISHED"


def test_a_metric_told_once_keeps_its_first_value_at_a_step(database: str, tmp_path: Path) -> None:
    for first, value in ((1, 1.0), (3, 2.0)):  # steps 3 and 4 are done again
        tracker = Tracker(database, "unclip", tmp_path, "eighth")
        tracker.start("prior", {}, {"unclip.key": "again"})
        for step in range(first, first + 4):
            tracker.metrics("prior", step, {"loss": value, "nan": float("nan")}, once=True)
        assert tracker.close(60)
    (child,) = runs(database, unclip__key="again")
    history = open_client(database).get_metric_history(child.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]
    assert len(open_client(database).get_metric_history(child.info.run_id, "nan")) == 6


def test_a_server_that_does_not_answer_and_a_uri_of_no_kind_are_refused() -> None:
    began = time.monotonic()
    with pytest.raises(Refused, match=r"MLflow server at http://127\.0\.0\.1:9 does not answer"):
        check_server("http://127.0.0.1:9")
    assert time.monotonic() - began < 60  # MLflow itself tries for minutes
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
