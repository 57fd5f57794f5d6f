"""What runs of the tiny recipe leave behind that are stopped, killed, beside each other, or on a cluster of others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from infra.store.opening import open_store
from tests.fixtures.net import wait_for_port
from tests.fixtures.ports import free_port
from tests.fixtures.tiny_run import UNCLIP, newest, unclip
from tests.proofs import kill, parallel

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BIN = Path(sys.executable).parent


def test_two_runs_at_once_both_end_well_and_train_nothing_twice(tmp_path: Path) -> None:
    store = tmp_path / "store"
    both = [kill.start(store, "--until", "prior"), kill.start(store, "--until", "prior")]
    assert [process.wait() for process in both] == [0, 0], store.with_suffix(".log").read_text()[-3000:]
    opened = open_store(str(store), create=False)
    runs = parallel.runs(store)
    for stage in ("clip", "prior"):
        assert len(list(opened.list(f"records/{stage}-1/"))) == 1
        assert runs.count(stage) == 1, runs
        assert parallel.last_losses(store, stage) == 1


def test_a_killed_driver_leaves_nothing_that_differs(finished: tuple[Path, str], tmp_path: Path) -> None:
    expected = kill.records(finished[0])
    assert "byte-identical" in kill.disturb(tmp_path, 1, 1, expected, 40.0, "--until", "prior")


def test_a_terminated_run_saves_its_fits_and_says_so(copy: Path) -> None:
    change = ("--only", "prior", "--set", "prior.train.steps=100000", "--set", "prior.checkpoint_seconds=1")
    log = copy.parent / "said.txt"
    with open(log, "w") as file:
        run = subprocess.Popen([*UNCLIP, "run", "tiny", "--store", str(copy), *change], stdout=file, stderr=file)
    until = time.monotonic() + 120
    while not (before := saved(copy)) and run.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 5, log.read_text()
    assert "the same command goes on from there" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert max(saved(copy)) > max(before)
    assert parallel.killed(copy) == ["prior", "tiny"]


def saved(store: Path) -> list[str]:
    """The valid checkpoints in a store, the oldest first."""
    names = (entry.name for entry in open_store(str(store)).list("checkpoints/"))
    return sorted(name for name in names if name.endswith("manifest.json"))


def test_a_run_on_an_existing_cluster_and_as_a_job(tmp_path: Path, head: tuple[str, str]) -> None:
    address, jobs = head
    store = tmp_path / "store"
    unclip("run", "tiny", "--store", store, "--address", address, "--until", "filter")
    said = unclip("submit", "tiny", "--store", store, "--address", jobs, "--until", "filter",
                  "--set", "world.pictures=440")  # fmt: skip
    followed = [str(BIN / "ray"), "job", "logs", "--follow", "--address", jobs, said.strip()]
    shown = {**os.environ, "RAY_AUTH_MODE": "token"}  # Ray's own command line shows a token only if told to
    logs = subprocess.run(followed, capture_output=True, text=True, check=False, timeout=240, env=shown)
    assert "succeeded" in logs.stderr + logs.stdout, logs.stdout[-3000:] + logs.stderr[-3000:]
    assert newest(store, "download").rows == 440


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A Ray head in processes of its own that asks for a token: (its address, its job server)."""
    import ray.util

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(BIN), prepend=":")  # as an image's python is unclip's
    subprocess.run([str(BIN / "ray"), "get-auth-token", "--generate"], check=True, capture_output=True)
    assert (tmp_path / ".ray" / "auth_token").is_file()
    port, dashboard, log = free_port(), free_port(), tmp_path / "head.log"
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
               f"--dashboard-agent-listen-port={free_port()}", "--num-cpus=2", "--disable-usage-stats"]  # fmt: skip
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        # Ray takes loopback for the machine's own address, so a head that listens on loopback alone is not found.
        ip = ray.util.get_node_ip_address()
        try:
            wait_for_port(dashboard, 180)
        except TimeoutError as error:
            raise AssertionError(f"the head did not start: {log.read_text()[-3000:]}") from error
        yield f"{ip}:{port}", f"http://127.0.0.1:{dashboard}"
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever of it would be left
