"""What MLflow knows of a fit that was killed, went on, or lost its server: each metric once. Real servers."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from infra.tracking.mlflow import open_client
from infra.tracking.tracker import DataSet, Tracker
from infra.tracking.uri import check_server, default_uri
from tests.fixtures.fits import Tiny, tiny
from tests.fixtures.mlflow import Tracked, mlflow_server
from tests.fixtures.ports import free_port
from tests.training.test_loop import SHORT, Seen
from training.checkpoint.store import Checkpoints
from training.job import FitHow, Job
from training.launch import train_local
from training.loop import train

STEPS = 24
OFTEN = FitHow(log_seconds=0, checkpoint_seconds=1000, preview_share=0.1)
OF_THE_CLOCK = ("samples_per_s", "time/", "mfu", "system/", "preview/")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of an SQLite database; its tables take seconds to make."""
    return default_uri(str(tmp_path_factory.mktemp("tracking")))


def history(uri: str, key: str) -> tuple[Any, dict[str, list[tuple[int, float]]]]:
    """The one run of a key, and what it has of each metric: (step, value), by step."""
    client = open_client(uri)
    everywhere = [found.experiment_id for found in client.search_experiments()]
    (run,) = client.search_runs(everywhere, f"tags.`unclip.key` = '{key}'")
    points = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return run, {name: sorted((point.step, point.value) for point in found) for name, found in points.items()}


class Killed(Exception):
    pass


def attempt(job: Job, world: Tiny, tracker: Tracker, lease: int, *, save_at: int, die_at: int) -> None:
    """A start of the fit that saves at a step and dies at a later one, which the next start does again."""
    asked = Counter[str]()

    def save() -> bool:
        asked["save"] += 1
        return asked["save"] == save_at

    def stop() -> bool:
        asked["stop"] += 1
        if asked["stop"] > die_at:
            raise Killed
        return False

    train(job, OFTEN, world.store, Tracked(tracker), lease=lease, stop=stop, save=save)


@pytest.mark.slow
def test_a_fit_that_goes_on_has_one_run_and_each_metric_once_a_step(world: Tiny, tmp_path: Path, database: str) -> None:
    job = world.job("prior", "resumed", **SHORT | {"steps": STEPS})
    rows = DataSet("embed", job.data["rows"], "s3://bucket/objects/a", "rows", {"rows": 96, "states": {"kept": 96}})
    ids = []
    for lease, (save_at, die_at) in enumerate([(4, 9), (3, 11), (0, STEPS)], 1):
        tracker = Tracker(database, "unclip", tmp_path / "spool", "run")
        tracker.start("prior", {"train": job.train}, {"unclip.key": job.key}, [rows])
        try:
            attempt(job, world, tracker, lease, save_at=save_at, die_at=die_at)
        except Killed:
            tracker.end("prior", "FAILED")
        else:
            tracker.end("prior")
        assert tracker.close(120)
        ids.append(history(database, job.key)[0].info.run_id)
    assert len(set(ids)) == 1

    run, told = history(database, job.key)
    assert run.info.status == "FINISHED"
    for name, points in told.items():
        assert len({step for step, _ in points}) == len(points), name
    seen = Seen()
    undisturbed = world.job("prior", "undisturbed", **SHORT | {"steps": STEPS})
    train_local(undisturbed, FitHow(log_seconds=0, preview_share=0), world.store, tmp_path / "out", seen)
    for name in {*seen.values[0], *seen.values[-1]}:
        if not name.startswith(OF_THE_CLOCK):
            pairs = zip(seen.steps, seen.values, strict=True)
            assert told[name] == [(step, values[name]) for step, values in pairs if name in values], name
    assert run.data.tags["unclip.checkpoint.samples"] == str(STEPS * 6)
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("embed", job.data["rows"][:36])
    assert {tag.key: tag.value for tag in data.tags}["version"] == job.data["rows"]


@pytest.mark.slow
def test_a_server_killed_while_a_fit_logs_is_caught_up_and_training_waits_for_none(world: Tiny, tmp_path: Path) -> None:
    database, port = default_uri(str(tmp_path)), free_port()
    job = world.job("upsampler", "served", **SHORT | {"steps": 150})
    seen: list[float] = []

    class Timed(Tracked):
        def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
            super().metrics(stage, step, values)
            seen.append(time.monotonic())

    with mlflow_server(database, port) as uri:
        check_server(uri)
        tracker = Tracker(uri, "served", tmp_path / "spool", "run")
        tracker.start("upsampler", {}, {"unclip.key": job.key})
        assert tracker.flush(120)
        fit = threading.Thread(
            target=train_local, args=(job, OFTEN, world.store, tmp_path / "out", Timed(tracker)), daemon=True
        )
        fit.start()
        while len(seen) < 20:
            time.sleep(0.005)
    gone = time.monotonic()  # killed by its process id, with SIGKILL, while events were on their way
    assert fit.is_alive()
    fit.join(300)
    assert sum(when > gone for when in seen) > 50
    assert tracker.pending
    assert tracker.trouble
    assert Checkpoints(world.store, job.key).newest().samples == 150 * 6
    with mlflow_server(database, port):
        assert tracker.flush(120)
        assert not tracker.trouble
        tracker.end("upsampler")
        assert tracker.close(120)
        run, told = history(uri, job.key)
        pictures = [file.path for file in open_client(uri).list_artifacts(run.info.run_id, "images")]
    assert [step for step, _ in told["loss"]] == list(range(1, 151))
    assert run.info.status == "FINISHED"
    assert list((tmp_path / "spool").iterdir()) == []
    steps = [path.split("+")[2] for path in pictures if path.endswith(".png")]
    assert steps
    assert len(set(steps)) == len(steps)
