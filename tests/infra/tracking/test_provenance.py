"""A run says which commit made it, or says nothing; never another repository's."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from infra.tracking.provenance import GIT_VARIABLE, git_tags, installed_packages, machine_tags


def git(folder: Path, *command: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.test", "-c", "init.defaultBranch=trunk"]
    told = subprocess.run(["git", "-C", folder, *who, *command], check=True, capture_output=True, text=True)
    return told.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init")
    (tmp_path / "code.py").write_text("one")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    git_tags.cache_clear()
    return tmp_path


def test_commit_branch_and_changes_are_told(repository: Path) -> None:
    (repository / "new.txt").write_text("not tracked")
    told = git_tags(repository)
    assert told["mlflow.source.git.commit"] == git(repository, "rev-parse", "HEAD")
    assert told["mlflow.source.git.branch"] == "trunk"
    assert told["mlflow.source.git.dirty"] == "false"
    (repository / "code.py").write_text("two")
    git_tags.cache_clear()
    assert git_tags(repository)["mlflow.source.git.dirty"] == "true"


def test_a_repository_around_installed_code_is_not_its_own(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = repository / "site-packages"
    installed.mkdir()
    assert git_tags(installed) == {}
    git_tags.cache_clear()
    monkeypatch.setenv(GIT_VARIABLE, json.dumps({"mlflow.source.git.commit": "of its sender"}))
    assert git_tags(installed) == {"mlflow.source.git.commit": "of its sender"}


def test_the_environment_is_told_by_versions() -> None:
    told = machine_tags()
    assert told["unclip.torch"] == version("torch")
    assert len(told["unclip.lock"]) == 64
    lines = installed_packages().splitlines()
    assert f"numpy=={version('numpy')}" in lines
    assert lines == sorted(lines, key=str.lower)
