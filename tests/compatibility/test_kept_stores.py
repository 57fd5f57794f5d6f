"""A store that an earlier commit made opens, is whole, and gives a run nothing to do."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from infra.store.opening import open_store
from pipelines.cli.main import main
from pipelines.release.open import open_release
from unclip import UnCLIP

HERE = Path(__file__).parent


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy of the kept store, with the recipe that made it in the current folder."""
    with tarfile.open(HERE / "schema-1.tar.xz") as packed:
        packed.extractall(tmp_path / "store", filter="data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(HERE)
    return str(tmp_path / "store")


def unclip(*words: str) -> int:
    """The exit code of a command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["unclip", *words])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


def test_a_plan_finds_everything_done(kept: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert unclip("plan", "recipe.yaml", "--store", kept, "--json") == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert len(stages) == 20
    assert [stage for stage in stages if stage["todo"] or not stage["present"]] == []


def test_all_of_it_is_whole(kept: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert unclip("data", "verify", "--store", kept) == 0
    assert unclip("releases", "verify", "--store", kept) == 0
    assert "all is whole" in capsys.readouterr().out


def test_its_champion_draws(kept: str) -> None:
    model = UnCLIP.load(open_release(open_store(kept), "champion"))
    assert model.generate(["a red square"], seeds=[0]).shape == (1, 3, 32, 32)
