"""A user's mistake is one paragraph and exit code 2, never a traceback."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from infra.ledger import Entry, Ledger
from infra.store.opening import open_store
from pipelines.cli import main as cli
from pipelines.engine.console import Console as StageConsole
from tests.fixtures.ports import free_port

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def unclip(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNCLIP_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unclip", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        code = stop.value.code
        return (0 if code is None else int(code)), out, err

    return run


def refused(result: tuple[int, str, str], *words: str, code: int = 2) -> None:
    """The result is one paragraph with that code and those words."""
    found, _, err = result
    assert found == code, err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    for word in words:
        assert word in err, err


def test_an_unknown_recipe_names_the_nearest(unclip: Run) -> None:
    refused(unclip("plan", "dmo"), "no recipe 'dmo'", "Did you mean 'demo'")


def test_an_unknown_key_names_the_nearest(unclip: Run) -> None:
    refused(unclip("plan", "tiny", "--set", "prior.train.setps=3"), "prior.train.setps", "did you mean 'steps'")
    refused(unclip("plan", "tiny", "--set", "dowload.size=3"), "dowload", "did you mean 'download'")


def test_a_wrong_type_names_the_key_and_the_value(unclip: Run) -> None:
    refused(unclip("plan", "tiny", "--set", "prior.train.steps=many"), "prior.train.steps", '"many"')
    refused(unclip("plan", "tiny", "--set", "prior.train.steps=1.5"), "prior.train.steps", "1.5")


def test_an_impossible_value_says_why(unclip: Run) -> None:
    refused(unclip("plan", "tiny", "--set", "prior.train.steps=0"), "train.steps is 0")


@pytest.mark.parametrize("stage", ["embed", "evaluate"])
@pytest.mark.parametrize("change", ["threads=0", "actors=-1", "cpus=-1", "gpus=-0.5"])
def test_an_impossible_pool_of_actors_is_refused(unclip: Run, stage: str, change: str) -> None:
    refused(unclip("plan", "tiny", "--set", f"{stage}.{change}"), change.replace("=", " is "))


def test_a_set_without_a_value_shows_the_form(unclip: Run) -> None:
    refused(unclip("plan", "tiny", "--set", "prior.train.steps"), "key=value")


def test_a_missing_list_is_named(unclip: Run) -> None:
    refused(unclip("plan", "tiny", "--set", "source.urls=nowhere.parquet"), "nowhere.parquet")


def test_an_unreadable_list_is_named(unclip: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"no parquet at all")
    refused(unclip("plan", "tiny", "--set", "source.urls=broken.parquet"), "broken.parquet")


def test_an_empty_list_is_an_error(unclip: Run, tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"url": pa.array([], pa.string()), "caption": pa.array([], pa.string())}), tmp_path / "e.parquet"
    )
    refused(unclip("plan", "tiny", "--set", "source.urls=e.parquet"), "e.parquet")


def test_a_missing_column_names_those_that_there_are(unclip: Run, tmp_path: Path) -> None:
    pq.write_table(pa.table({"link": ["http://a.test/1"], "text": ["a"]}), tmp_path / "odd.parquet")
    refused(unclip("plan", "tiny", "--set", "source.urls=odd.parquet"), "url", "link")


def test_a_store_that_cannot_be_written_is_an_error(unclip: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    refused(unclip("run", "tiny", "--store", tmp_path / "file" / "store"), str(tmp_path / "file"))


@pytest.mark.slow
def test_a_plan_makes_no_store(unclip: Run, tmp_path: Path) -> None:
    code, out, err = unclip("plan", "tiny")
    assert code == 0, err
    assert "download" in out
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_a_plan_says_what_the_fits_ask_of_the_machine(unclip: Run) -> None:
    card = ("--set", "hardware={H: {tflops: 0.5, memory_gib: 1, hourly: 2}}")
    assert "FLOPs a sample" in unclip("plan", "tiny", *card)[1]
    fits = json.loads(unclip("plan", "tiny", "--json", *card)[1])["fits"]
    assert {fit["stage"] for fit in fits} == {"clip", "decoder", "prior", "upsampler-32", "upsampler-64"}
    assert all(fit["on"]["H"]["hours"] > 0 for fit in fits)


def test_no_champion_yet_says_how_to_get_one(unclip: Run) -> None:
    refused(unclip("generate", "a red circle"), "champion")


def test_guidance_that_is_no_number(unclip: Run) -> None:
    refused(unclip("generate", "a red circle", "--guidance", "much"), "--guidance", "much")
    refused(unclip("generate", "a red circle", "--guidance", "nan"), "guidance")
    refused(unclip("generate", "a red circle", "--clip-guidance", "much"), "--clip-guidance", "much")
    refused(unclip("generate", "a red circle", "--label-guidance", "-1"), "--label-guidance", "0 is unguided")


def test_a_label_without_a_class_shows_the_form(unclip: Run) -> None:
    refused(unclip("generate", "a red circle", "--label", "circle"), "'circle'", "--label shape=circle")


def test_a_ray_address_that_does_not_answer(unclip: Run) -> None:
    refused(unclip("run", "tiny", "--address", f"127.0.0.1:{free_port()}"), "127.0.0.1", "answer")


def test_an_mlflow_server_that_does_not_answer(unclip: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    refused(unclip("run", "tiny"), "MLflow", "tracking.required=false")


def test_a_stage_that_does_not_exist(unclip: Run) -> None:
    refused(unclip("run", "tiny", "--until", "decodr"), "Did you mean 'decoder'")


def test_only_without_inputs(unclip: Run) -> None:
    refused(unclip("run", "tiny", "--only", "decoder"), "--until")


def test_until_and_only_exclude_each_other(unclip: Run) -> None:
    refused(unclip("run", "tiny", "--until", "embed", "--only", "embed"), "--until", "--only")


def test_ctrl_c_ends_with_a_word() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # a store that never answers
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        environment = {**os.environ, **keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.getsockname()[1]}"}
        command = [sys.executable, "-m", "pipelines.cli", "data", "ls", "--store", "s3://bucket/prefix"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        server.settimeout(60)
        asked, _ = server.accept()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        asked.close()
    assert process.returncode == 5
    assert err == "unclip: stopped by Ctrl-C. What finished is kept; the same command goes on from there.\n"


def test_an_empty_stage_is_none_and_the_known_ones_are_listed(unclip: Run) -> None:
    refused(unclip("run", "tiny", "--until", ""), "no stage ''", "download", "upsampler-64")
    refused(unclip("run", "tiny", "--only", "nothing"), "no stage 'nothing'", "source", "promote")
    refused(unclip("run", "tiny", "--until", "", "--only", ""), "--until", "--only")


def test_a_score_that_no_evaluation_gives(unclip: Run) -> None:
    refused(unclip("plan", "tiny", "--set", "gate.minimum={x: 1}"), "Recipe tiny: gate.minimum", "'x'", "single.all")
    change = "evaluate.judge=null"
    refused(unclip("plan", "tiny", "--set", "gate.minimum={single.all: 1}", "--set", change), "evaluate.judge")
    change = "evaluate.reference=null"
    refused(unclip("plan", "tiny", "--set", "gate.minimum={cmmd: 1}", "--set", change), "evaluate.reference")


def test_a_port_that_cannot_be_had(unclip: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused(unclip("ui", "--port", taken.getsockname()[1]), "--port", "in use")
    for port in (0, -1, 65536):
        refused(unclip("ui", "--port", port), f"--port {port} is no port; give one from 1 to 65535")


@pytest.mark.parametrize("address", ["127.0.0.1", "http://localhost"])
def test_a_job_on_this_machine_may_use_a_folder(unclip: Run, address: str) -> None:
    """Whichever way the address is written: it is the job server that is missed, not an S3 store."""
    refused(unclip("submit", "tiny", "--address", f"{address}:{free_port()}"), "no Ray job server answers")
    refused(unclip("submit", "tiny", "--address", "10.9.8.7:8265"), "cannot reach the folder", "s3://")


def test_a_table_in_a_pipe_has_whole_lines(unclip: Run, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    reason = "a reason of many words " * 10
    for number in range(2):
        head = Ledger(store, "cars").head()
        Ledger(store, "cars").append(Entry("promote", f"{number}" * 64, None, reason), after=head)
    code, out, err = unclip("releases", "list")  # the only line that there is
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == 3
    assert all(reason.strip() in line and line == line.rstrip() for line in lines[1:])
    assert "000000000000" in lines[1]
    assert "111111111111" in lines[2]
    Ledger(store, "boats").append(Entry("promote", "2" * 64, None, ""), after=None)
    refused(unclip("releases", "list"), "boats, cars", "--name")
    refused(unclip("generate", "a red circle"), "boats, cars", "@champion")
    assert "no release of 'unclip'" in unclip("releases", "list", "--name", "unclip")[1]


@pytest.mark.parametrize("columns", [80, 120])
def test_the_live_table_fits_the_terminal(columns: int) -> None:
    terminal = Console(width=columns, file=io.StringIO(), force_terminal=True, color_system=None)
    live = StageConsole(["evaluate-sample", "upsampler-1024"], terminal)
    live.state("upsampler-1024", "running", 0, 1)
    live.board({"upsampler-1024": {"done": 43200, "total": 57600, "unit": "samples", "rate": 1234.0, "loss": 0.5}})
    terminal.print(live._table())
    line = [line for line in terminal.file.getvalue().splitlines() if "upsampler" in line][-1]
    assert all(part in line for part in ("43,200/57,600 samples", "1,234/s", "0.5000", "0:12"))
    assert "…" not in line
    assert ("━" in line) == (columns > 100)
