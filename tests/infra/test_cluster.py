"""Ray as this project starts it, joins it and hands it jobs; and the monitor that lives in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from infra.cluster import connect, submit
from infra.errors import Refused
from infra.mlflow_runs import open_client
from infra.monitor import NullMonitor
from infra.tracking_uri import default_uri
from pipelines import recipe, workflow
from pipelines.admission import needs_of
from tests.fixtures.s3 import free_port

RUN = """
import json, os, signal, sys, time, urllib.request
from infra.board import Extent
from infra.cluster import connect, disconnect, submit
from concurrent.futures import ThreadPoolExecutor
from infra.monitor import Monitor
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

# A stage of three shards, told of by two workers; and what Ray's own metrics endpoint says of it.
@ray.remote(num_cpus=0)
def shard(monitor, name, states):
    monitor.shard("download", name, {"kept": 1}, 100)
    return name, states

monitor.begin("download", Extent(3, 1, {"kept": 5}), {"size": 64}, {"unclip.key": "download"})
told = [("a", {"kept": 90, "http_404": 10}), ("b", {"kept": 60, "http_404": 30, "timeout": 10})]
for name, states in ray.get([shard.remote(monitor, *one) for one in told]):
    monitor.shard("download", name, states, done=True)
(node,) = ray.nodes()
address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

def scraped():
    from prometheus_client.parser import text_string_to_metric_families
    with urllib.request.urlopen(address, timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return [[one.name, one.labels["stage"], one.labels.get("reason", ""), one.value]
            for family in families for one in family.samples if one.name.startswith("ray_unclip")]

monitor.finish("download")
until = time.monotonic() + 60
while len(exported := scraped()) < 6 and time.monotonic() < until:
    time.sleep(0.5)
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
                  "closed": closed, "dashboard": info.dashboard, "left": ray.is_initialized(),
                  "exported": exported}))
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
    ran = subprocess.run(
        [sys.executable, "-c", RUN, uri, tmp_path / "job"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "RAY_metrics_report_interval_ms": "500"},
    )
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
    (stage,) = open_client(uri).search_runs(["1"], "tags.`unclip.key` = 'download'")
    said = stage.data.metrics
    assert said.pop("rows_per_s") > 0
    assert said == {
        "shards": 3,
        "rows": 205,
        "success_rate": pytest.approx(155 / 205),
        "rows.kept": 155,
        "rows.http_404": 40,
        "rows.timeout": 10,
    }
    assert stage.data.params == {"size": "64"}
    assert stage.info.status == "FINISHED"
    points = open_client(uri).get_metric_history(stage.info.run_id, "rows")
    assert (points[-1].step, points[-1].value) == (3, 205)
    exported = {(name, stage, reason): value for name, stage, reason, value in told["exported"]}
    assert exported == {
        ("ray_unclip_shards", "download", ""): 3,
        ("ray_unclip_rows_per_s", "download", ""): 0,  # it has ended
        ("ray_unclip_success_rate", "download", ""): pytest.approx(155 / 205),
        ("ray_unclip_rows_total", "download", "kept"): 150,  # of this run
        ("ray_unclip_rows_total", "download", "http_404"): 40,
        ("ray_unclip_rows_total", "download", "timeout"): 10,
    }


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
    assert time.monotonic() - began < 20


def test_a_null_monitor_keeps_what_it_is_told() -> None:
    monitor = NullMonitor()
    monitor.start("prior", {}, {})
    monitor.progress("prior", 3, 9, "steps", 2.0)
    monitor.metrics("prior", 3, {"loss": 0.5})
    assert monitor.board() == {"prior": {"done": 3, "total": 9, "unit": "steps", "rate": 2.0, "loss": 0.5}}
    assert monitor.flush()
