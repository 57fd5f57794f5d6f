"""Ray as this project starts it, joins it and hands it jobs; and the monitor that lives in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from infra.cluster import connect, submit
from infra.errors import Refused
from infra.tracking.mlflow import open_client
from infra.tracking.monitor import NullMonitor
from infra.tracking.uri import default_uri
from pipelines.engine.admission import needs_of
from pipelines.recipe import schema as recipe
from pipelines.recipe import stages as workflow
from tests.fixtures.ports import free_port

RUN = """
import json, os, signal, sys, time
from infra.cluster import connect, disconnect, submit
from concurrent.futures import ThreadPoolExecutor
from infra.tracking.monitor import Monitor
with ThreadPoolExecutor(1) as pool:  # whose thread ends, and Ray stays
    info = pool.submit(connect, None, 2).result()
import ray
monitor = Monitor.launch(sys.argv[1], "unclip", "demo", "store")

@ray.remote(num_cpus=0)
def work(monitor):
    monitor.start("prior", {"width": 8}, {"unclip.key": "key"})
    for step in range(1, 101):
        monitor.metrics("prior", step, {"loss": 1 / step})
        monitor.progress("prior", step, 100, "steps", 3.0)
    return os.getpid()

ray.get(work.remote(monitor))
until = time.monotonic() + 30
while (board := monitor.board()).get("prior", {}).get("done") != 100 and time.monotonic() < until:
    time.sleep(0.1)  # the worker's messages come in their order, and ours not behind them
assert monitor.flush(60), monitor.trouble()
again = connect(None, 2)
job = submit(info.dashboard, "test $RAY_JOB_STOP_WAIT_TIME_S = 120 && test -e marker", sys.argv[2], {})
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient(info.dashboard)
while not client.get_job_status(job).is_terminal():
    time.sleep(0.2)
status = client.get_job_status(job).value
monitor.end("prior")
monitor.end("")
closed = monitor.close()
disconnect()
print(json.dumps({"board": board, "cpus": info.cpus, "local": info.local, "again": again == info, "job": status,
                  "closed": closed, "dashboard": info.dashboard, "left": ray.is_initialized()}))
"""


SHIPPED = yaml.safe_load((Path(__file__).parents[2] / "ray_cluster.yaml").read_text())["spec"]


def pods() -> list[tuple[int, int, dict[str, float]]]:
    """Of each group of workers: the fewest pods, the most, and what one of them has."""
    found = []
    for group in SHIPPED["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        asked = container["resources"]["requests"]
        has = {"CPU": float(asked["cpu"]), "GPU": float(asked.get("nvidia.com/gpu", 0))}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        found.append((group["minReplicas"], group["maxReplicas"], has))
    return found


def fits(name: str) -> list[object]:
    inputs = workflow.Inputs("list.parquet", ("0" * 64,), str(recipe.FOLDER / "prompts.jsonl"), None)
    return [stage for stage in workflow.stages(recipe.load(name), inputs) if stage.kind == "fit"]


@pytest.mark.parametrize("name", recipe.names())
def test_the_shipped_cluster_can_grow_to_hold_every_fit_of_a_shipped_recipe(name: str) -> None:
    assert SHIPPED["enableInTreeAutoscaling"]
    for stage in fits(name):
        for resource, amount in needs_of(stage).items():
            assert amount <= sum(most * has[resource] for _, most, has in pods()), (stage, resource)
        assert workers(stage, most=True) >= stage.how.workers, stage


def test_the_shipped_cluster_at_its_smallest_holds_every_fit_of_laion_art() -> None:
    for stage in fits("laion-art"):
        assert workers(stage, most=False) >= stage.how.workers, stage


def workers(stage: object, *, most: bool) -> int:
    """How many workers of a fit find room, each whole in one pod, in the largest or the smallest cluster."""
    need = {resource: amount for resource, amount in {"CPU": stage.how.cpus, "GPU": stage.how.gpus}.items() if amount}
    return sum(
        (upper if most else lower) * int(min(has[resource] / amount for resource, amount in need.items()))
        for lower, upper, has in pods()
    )


@pytest.mark.ray
@pytest.mark.slow
def test_a_local_ray_holds_a_monitor_and_takes_a_job(tmp_path: Path) -> None:

    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "marker").touch()
    uri = default_uri(str(tmp_path / "store"))
    with tempfile.TemporaryDirectory() as folder:  # sockets are made there: tmp_path is too long for them
        ran = subprocess.run(
            [sys.executable, "-c", RUN, uri, tmp_path / "job"],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"TMPDIR": folder, "RAY_TMPDIR": "/tmp"},
        )
        assert not os.listdir(folder)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)  # and not a line of Ray's beside it
    assert told["board"] == {"prior": {"done": 100, "total": 100, "unit": "steps", "rate": 3.0, "loss": 0.01}}
    assert (told["cpus"], told["local"], told["again"], told["left"]) == (2, True, True, False)
    assert told["dashboard"].startswith("http://127.0.0.1:")
    assert told["job"] == "SUCCEEDED"
    assert told["closed"]
    (child,) = open_client(uri).search_runs(["1"], "tags.`unclip.key` = 'key'")
    assert child.data.metrics["loss"] == 0.01
    assert child.info.status == "FINISHED"


@pytest.mark.slow
def test_an_address_that_does_not_answer_is_refused_within_seconds(s3_endpoint: str) -> None:
    began = time.monotonic()
    for address in (f"127.0.0.1:{free_port()}", f"ray://127.0.0.1:{free_port()}"):
        with pytest.raises(Refused, match="no Ray cluster answers"):
            connect(address)
    with pytest.raises(Refused, match="something else listens"):
        connect(s3_endpoint.removeprefix("http://"))
    for address in ("nonsense", "host", "http://host:1", "ray://host:port"):
        with pytest.raises(Refused, match="is no Ray address"):
            connect(address)
    with pytest.raises(Refused, match="no Ray job server answers"):
        submit(f"127.0.0.1:{free_port()}", "true", ".", {})
    assert time.monotonic() - began < 60  # Ray itself tries for minutes


def test_a_null_monitor_keeps_what_it_is_told() -> None:
    monitor = NullMonitor()
    monitor.start("prior", {}, {})
    monitor.progress("prior", 3, 9, "steps", 2.0)
    monitor.metrics("prior", 3, {"loss": 0.5})
    assert monitor.board() == {"prior": {"done": 3, "total": 9, "unit": "steps", "rate": 2.0, "loss": 0.5}}
    assert monitor.flush()
