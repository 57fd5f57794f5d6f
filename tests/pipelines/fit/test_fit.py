"""A CLIP that is loaded is the one that its key names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from infra.documents import digest_file
from infra.errors import Refused
from infra.store.opening import open_store
from pipelines.embed.stage import load_clip
from pipelines.fit.clip import LoadClip, LoadHow, LoadSpec
from pipelines.recipe import schema as recipe
from pipelines.recipe import stages as workflow
from tests.fixtures.stages import CLIP, make, todo
from unclip.clip.model import build_clip


@pytest.mark.slow
def test_a_file_of_weights_becomes_this_pipelines_clip(tmp_path: Path) -> None:
    import open_clip

    (tmp_path / "tiny-file.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(tmp_path / "tiny-file.json")
    module = build_clip(CLIP)
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    store = open_store(str(tmp_path / "store"))
    stage = LoadClip.of(LoadSpec("tiny-file"), LoadHow(str(tmp_path / "weights.pt")))
    record = make(store, stage).only
    loaded = load_clip(store, make(store, stage).version, "cpu")
    assert record.facts["fingerprint"] == loaded.fingerprint
    expected = module.state_dict()
    assert loaded.state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state.items())


def test_a_file_that_is_not_the_keys_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"one")
    stage = LoadClip.of(LoadSpec("ViT-S-32-alt", tag="ignored"), LoadHow(str(weights)))
    assert stage.spec == LoadSpec("ViT-S-32-alt", "", digest_file(weights))
    assert stage.kind == "driver"
    weights.write_bytes(b"two")
    store = open_store(str(tmp_path / "store"))
    with pytest.raises(Refused, match="was changed while this run went on") as caught:
        make(store, stage)
    assert caught.value.code == 5
    assert todo(store, stage) == 1


def test_a_recipe_says_name_tag_or_file_and_not_the_digest(tmp_path: Path) -> None:
    def clip(pretrained: str) -> LoadClip:
        inputs = workflow.Inputs("list.parquet", ("0" * 64,), str(recipe.FOLDER / "prompts.jsonl"), None)
        made = workflow.stages(recipe.load("laion-art", [f"clip.pretrained={pretrained}"]), inputs)
        return next(stage for stage in made if isinstance(stage, LoadClip))

    assert clip("{name: ViT-L-14, tag: openai}") == LoadClip(LoadSpec("ViT-L-14", "openai"))
    (tmp_path / "weights").write_bytes(b"weights")
    found = clip(f"{{name: ViT-L-14, file: {tmp_path / 'weights'}}}")
    assert found.spec.sha256 == digest_file(tmp_path / "weights")
    assert found.how.file == str(tmp_path / "weights")
    for place in ("here", "there"):  # the key is of what a folder holds, not of where it lies
        (tmp_path / place).mkdir()
        (tmp_path / place / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP}))
        (tmp_path / place / "open_clip_model.safetensors").write_bytes(b"weights")
    stages = [clip(f"{{name: 'local-dir:{tmp_path / place}'}}") for place in ("here", "there")]
    assert stages[0].spec == stages[1].spec
    assert stages[0].how != stages[1].how
    (tmp_path / "there" / "open_clip_model.safetensors").write_bytes(b"others")
    assert clip(f"{{name: 'local-dir:{tmp_path / 'there'}'}}").spec != stages[0].spec
    with pytest.raises(Refused, match=r"clip\.pretrained\.name: .* there is no such folder"):
        clip("{name: 'local-dir:nowhere'}")
    with pytest.raises(Refused, match="is no file"):
        clip("{name: ViT-L-14, file: nowhere}")
    with pytest.raises(Refused, match=r"clip\.pretrained\.sha256 is no known key; known keys: name, tag, file"):
        clip("{name: ViT-L-14, sha256: '00'}")
