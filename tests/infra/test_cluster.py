"""Ray as this project starts it, joins it and hands it jobs; and the monitor that lives in it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.cluster import connect, submit
from infra.errors import Refused
from infra.monitor import NullMonitor
from infra.tracking import default_uri, open_client
from tests.fixtures.s3 import free_port

RUN = """
import json, os, signal, sys, time
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


@pytest.mark.ray
@pytest.mark.slow
def test_a_local_ray_holds_a_monitor_and_takes_a_job(tmp_path: Path) -> None:

    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "marker").touch()
    uri = default_uri(str(tmp_path / "store"))
    ran = subprocess.run(
        [sys.executable, "-c", RUN, uri, tmp_path / "job"], capture_output=True, text=True, check=False
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
