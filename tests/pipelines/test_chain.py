"""The whole chain on the tiny recipe: from a web server to a promoted release, and what a second run costs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest

from infra.ledger import Ledger
from infra.manifest import Manifest, digest_file
from infra.mlflow_runs import open_client
from infra.store import open_store
from infra.tracking_uri import default_uri
from pipelines import recipe
from pipelines.opening import open_release
from tests.fixtures import beside_diffusers
from tests.fixtures.net import wait_for_port
from tests.fixtures.s3 import free_port
from tests.proofs import kill, parallel
from unclip import UnCLIP

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BIN = Path(sys.executable).parent
UNCLIP = [sys.executable, "-m", "pipelines.cli"]


def unclip(*words: object, cwd: Path | None = None) -> str:
    """Runs the command line to its end; fails with its output unless it exits with 0."""
    done = subprocess.run([*UNCLIP, *map(str, words)], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def todo(store: Path, *options: object) -> dict[str, int]:
    """Stage → actions to do, from `unclip plan --json`."""
    lines = json.loads(unclip("plan", "tiny", "--json", "--store", store, *options))["stages"]
    return {line["stage"]: line["todo"] for line in lines if line["todo"]}


def newest(store: Path, stage: str) -> Manifest:
    """The newest manifest of a stage."""
    opened = open_store(str(store), create=False)
    heads = [entry for entry in opened.list("manifests/") if entry.name.startswith(f"manifests/{stage}-1/")]
    head = max(heads, key=lambda entry: entry.modified)
    return Manifest.load(opened, json.loads(opened.get(head.name))["version"])


def objects(store: Path) -> set[str]:
    """Names of everything that is data: records, manifests, objects, ledgers."""
    opened = open_store(str(store), create=False)
    return {e.name for e in opened.list("") if e.name.startswith(("records/", "manifests/", "objects/", "ledgers/"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A store in which the tiny recipe ran to its end, and what the terminal said."""
    store = tmp_path_factory.mktemp("chain") / "store"
    return store, unclip("run", "tiny", "--store", store)


@pytest.fixture
def copy(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A store of one's own in that state."""
    return Path(shutil.copytree(finished[0], tmp_path / "store"))


def test_a_run_ends_with_a_champion_and_says_how_to_use_it(finished: tuple[Path, str]) -> None:
    store, said = finished
    head = Ledger(open_store(str(store)), "tiny").head()
    assert head is not None
    for word in ("champion", "grid", "report", "unclip ui", "unclip generate"):
        assert word in said
    assert "(raylet)" not in said
    assert "WARNING" not in said


def test_a_second_run_starts_no_ray_and_changes_nothing(finished: tuple[Path, str]) -> None:
    store, _ = finished
    before = objects(store)
    said = unclip("run", "tiny", "--store", store)
    assert "starting Ray" not in said
    assert objects(store) == before
    assert todo(store) == {}


def test_diffusers_draws_from_the_export_what_the_champion_draws(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unclip("releases", "export", "champion", tmp_path / "diffusers", "--store", finished[0])
    model = UnCLIP.load(open_release(open_store(str(finished[0])), "champion"))
    pipe = beside_diffusers.pipeline(tmp_path / "diffusers")
    beside_diffusers.exact(pipe)
    unguided = {"prior": 1.0, "decoder": 1.0}
    pictures = beside_diffusers.drawn(model, unguided)
    assert beside_diffusers.far(beside_diffusers.theirs(pipe, monkeypatch, unguided), pictures) < 1e-4
    # The first step divides rounding by an α of 5e-5, guidance multiplies it, and clipping to ±1 hides it but in the
    # odd pixel that lies between: one of 6,144 was off by 2.5e-4, the mean by 8e-8.
    pictures = beside_diffusers.drawn(model, beside_diffusers.SCALES)
    apart = (beside_diffusers.theirs(pipe, monkeypatch, beside_diffusers.SCALES) - pictures).abs()
    assert float(apart.mean()) < 1e-6
    assert float((apart > 1e-4).float().mean()) < 2e-3


def test_gc_leaves_all_that_a_run_and_a_release_need(copy: Path) -> None:
    for keep in ("all", "newest"):
        unclip("data", "gc", "--keep", keep, "--older-than", 0, "--delete", "--store", copy)
        assert todo(copy) == {}
        assert "are whole" in unclip("releases", "verify", "--name", "tiny", "--store", copy)
        assert "all is whole" in unclip("data", "verify", "--store", copy)


def test_every_row_of_the_list_is_in_exactly_one_final_state(finished: tuple[Path, str]) -> None:
    from pipelines.data import reconcile

    store, _ = finished
    stages = ("source", "download", "filter", "embed", "curate")
    states = reconcile(*(newest(store, stage) for stage in stages))
    assert recipe.load("tiny").world is not None
    assert sum(states.values()) == recipe.load("tiny").world.pictures  # type: ignore[union-attr]
    assert states["kept"] > 0.5 * sum(states.values())
    assert {"filter.exact_duplicates", "filter.near_duplicates", "curate.clip_score"} <= set(states)


def test_mlflow_knows_what_became_of_the_rows_of_every_data_stage(finished: tuple[Path, str]) -> None:
    query = "select m.key, m.value from latest_metrics m join runs r using (run_uuid) where r.name = ? and r.status = ?"
    for stage in ("download", "filter", "embed", "curate"):
        with sqlite3.connect(finished[0] / "mlflow" / "mlflow.db") as database:
            told = dict(database.execute(query, (stage, "FINISHED")).fetchall())
        made = newest(finished[0], stage)
        assert {name.removeprefix("rows."): count for name, count in told.items() if "." in name} == made.states
        assert (told["rows"], told["shards"]) == (made.rows, len(made.records))
        assert told["success_rate"] == pytest.approx(made.states["kept"] / made.rows)


def test_mlflow_knows_recipe_code_and_data_of_a_run_and_finds_the_data_itself(finished: tuple[Path, str]) -> None:
    store = finished[0]
    client = open_client(default_uri(str(store)))
    import mlflow.data

    runs = client.search_runs([client.get_experiment_by_name("unclip").experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.data.tags["mlflow.source.name"] == "unclip run tiny"
    assert parent.data.tags["unclip.torch"] == version("torch")
    kept = Path(parent.info.artifact_uri.removeprefix("file://"))
    assert recipe.load(str(kept / "recipe.yaml")) == recipe.load("tiny")
    assert f"ray=={version('ray')}" in (kept / "packages.txt").read_text().splitlines()
    (decoder,) = [run for run in runs if run.info.run_name == "decoder"]
    assert decoder.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert decoder.data.tags.get("mlflow.source.git.commit") == parent.data.tags.get("mlflow.source.git.commit")
    made = newest(store, "decoder").only
    assert decoder.data.tags["unclip.made.model.safetensors"] == made.sha("model.safetensors")
    assert int(decoder.data.tags["unclip.checkpoint.samples"]) == made.facts["samples"]
    read = {data.dataset.name: data for data in decoder.inputs.dataset_inputs}
    assert set(read) == {"embed", "curate", "statistics", "clip"}
    for stage, data in read.items():
        manifest = newest(store, stage)
        assert data.dataset.digest == manifest.version[:36]
        assert digest_file(Path(mlflow.data.get_source(data).load())) == manifest.version
        assert json.loads(data.dataset.profile)["states"] == manifest.states


def test_a_run_leaves_a_page_about_its_data(finished: tuple[Path, str], tmp_path: Path) -> None:
    store, said = finished
    (line,) = [line for line in said.splitlines() if line.startswith("data  ")]
    page = Path(line.split()[1])
    assert page == store / "view" / newest(store, "curate").version[:12] / "data.html"
    unclip("data", "report", "--store", store, "--out", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_the_trainers_overlap_in_time(finished: tuple[Path, str]) -> None:
    spans = parallel.spans(finished[0])
    assert len(spans) == 4
    assert max(start for start, _ in spans.values()) < min(end for _, end in spans.values())


def test_another_number_of_prior_steps_redoes_the_prior_and_what_is_behind_it(copy: Path) -> None:
    change = ("--set", "prior.train.steps=9")
    expected = {"prior", "bundle", "evaluate-sample", "evaluate", "gate", "promote", "report"}
    assert set(todo(copy, *change)) == expected
    before = objects(copy)
    unclip("run", "tiny", "--store", copy, *change)
    new = {name.split("/")[1].rsplit("-", 1)[0] for name in objects(copy) - before if name.startswith("records/")}
    assert new == expected


def test_a_tenth_more_rows_download_and_embed_only_the_new_shards(copy: Path) -> None:
    world = recipe.load("tiny").world
    assert world is not None
    change = ("--set", f"world.pictures={world.pictures * 11 // 10}")
    shards = len(newest(copy, "download").records)
    download = todo(copy, *change)["download"]
    assert 1 <= download <= max(2, shards // 5 + 1)
    before = objects(copy)
    unclip("run", "tiny", "--store", copy, "--until", "embed", *change)
    grown = [name for name in objects(copy) - before if name.startswith("records/")]
    assert sum(name.startswith("records/download-") for name in grown) == download


def test_killed_drivers_leave_nothing_that_differs(finished: tuple[Path, str], tmp_path: Path) -> None:
    expected = kill.records(finished[0])
    assert "byte-identical" in kill.disturb(tmp_path, 2, 1, expected, 60.0, "--until", "prior")


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


def test_generate_draws_with_the_champion(finished: tuple[Path, str], tmp_path: Path) -> None:
    from PIL import Image

    out = tmp_path / "grid.png"
    unclip("generate", "a large red circle on a white background", "-n", 2, "--release", "tiny@champion",
           "--out", out, "--store", finished[0])  # fmt: skip
    assert Image.open(out).width >= 2 * 64


def test_the_models_and_data_can_be_looked_at(finished: tuple[Path, str]) -> None:
    store, _ = finished
    assert "embed" in unclip("data", "ls", "--store", store)
    assert "promote" in unclip("releases", "list", "--name", "tiny", "--store", store)
    assert json.loads(unclip("releases", "show", "tiny@champion", "--store", store))
    assert unclip("releases", "verify", "--name", "tiny", "--store", store)


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
