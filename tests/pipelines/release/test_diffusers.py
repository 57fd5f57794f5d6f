"""`unclip releases export` and `import`: a release leaves a store for diffusers' layout and enters another."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from infra.errors import Refused as InfraRefused
from infra.store.opening import open_store
from pipelines.cli.main import app
from pipelines.release.open import bundles, open_release
from tests.fixtures.plain import ours, saved
from unclip import UnCLIP
from unclip.errors import Refused


def unclip(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_a_release_leaves_one_store_and_draws_in_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = saved(ours(), tmp_path)
    said = unclip("releases", "export", folder, tmp_path / "diffusers", "--store", tmp_path / "none")
    assert "pictures of 32 px" in said
    assert "upsampler-64" in said
    store = tmp_path / "store"
    said = unclip("releases", "import", tmp_path / "diffusers", "--name", "guest", "--store", store)
    (version,) = bundles(open_store(str(store)))
    assert version[:12] in said
    assert unclip("releases", "import", tmp_path / "diffusers", "--name", "guest", "--store", store) == said
    assert '"name": "guest"' in unclip("releases", "show", version[:12], "--store", store)
    assert UnCLIP.load(open_release(open_store(str(store)), version)).size == 32
    unclip(
        "generate", "a red circle", "-n", 1, "--release", version[:12], "--store", store, "--out", tmp_path / "a.png"
    )
    assert (tmp_path / "a.png").stat().st_size > 0
    unclip("releases", "promote", version[:12], "--name", "guest", "--store", store)
    unclip("releases", "verify", "--name", "guest", "--store", store)


def test_what_cannot_be_brought_in_leaves_the_store_empty(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"model_index\.json does not exist"):
        unclip("releases", "import", tmp_path, "--store", tmp_path / "store")
    assert bundles(open_store(str(tmp_path / "store"))) == []


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InfraRefused, match="diffusers"):
        unclip("releases", "export", tmp_path, tmp_path / "out", "--format", "onnx", "--store", tmp_path)
