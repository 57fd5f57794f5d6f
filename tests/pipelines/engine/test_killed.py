"""kill -9 of a driver in the middle of a stage that it does itself; of workers and nodes, and in every stage of the
data, it is tests/proofs/faults.py that shows it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from infra.store.base import Entry
from infra.store.opening import open_store
from tests.fixtures.holding import ROOT, Holding, drawn


@pytest.mark.slow
def test_a_driver_killed_in_the_middle_of_a_stage_leaves_nothing_that_is_taken_for_data(tmp_path: Path) -> None:
    holding = Holding(tmp_path / "held")

    def start(store: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pipelines.cli", "run", "tiny", "--until", "source", "--store", store]
        environment = {**os.environ, **holding.environment}
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)

    def documents(store: str) -> dict[str, bytes]:
        opened = open_store(store, create=False)
        names: list[Entry] = [*opened.list("records/"), *opened.list("manifests/")]
        return {entry.name: opened.get(entry.name) for entry in names}

    undisturbed, killed = str(tmp_path / "undisturbed"), str(tmp_path / "killed")
    holding.arm({}, write=True)
    assert holding.wait(start(undisturbed)) is None
    steps = holding.steps()["source"]
    draw = random.Random(0)
    for place in ("perform", "_stage"):  # while slices are made and committed; while they are listed
        holding.arm({"source": drawn([step for step in steps if step[0] == place], draw)})
        run = start(killed)
        found = holding.wait(run)
        run.kill()
        run.wait()
        assert found == ("source", run.pid)
        # Part of what is to come, or all of it: the last steps of all are taken once the manifest stands.
        assert documents(killed).items() <= documents(undisturbed).items()
    holding.arm({})
    run = start(killed)
    assert holding.wait(run) is None
    assert run.returncode == 0
    assert documents(killed) == documents(undisturbed)
    assert list((tmp_path / "killed" / "tmp").iterdir()) == []
