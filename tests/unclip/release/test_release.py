"""A release folder is complete, unaltered and of parts that fit, or it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.fixtures.release import SAMPLING, write_parts, write_release
from unclip import UnCLIP
from unclip.diffusion.settings import Sampling
from unclip.errors import Refused
from unclip.files import read_tensors
from unclip.presets import TINY
from unclip.release.folder import check_release, save_release
from unclip.release.model import load_model, save_model


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def folder(parts: dict[str, Path], tmp_path: Path) -> Path:
    save_release(tmp_path / "release", "tiny", parts, SAMPLING, {"embed": "abc"})
    return tmp_path / "release"


def change(folder: Path, **entries) -> None:
    """Rewrites release.json, as a new file: its neighbours may be hard links into other folders."""
    path = folder / "release.json"
    document = json.loads(path.read_text()) | entries
    path.unlink()
    path.write_text(json.dumps(document))


def test_a_release_says_what_it_is(folder: Path, parts: dict[str, Path]):
    found = check_release(folder)
    assert found.name == "tiny"
    assert found.data == {"embed": "abc"}
    assert found.sampling == SAMPLING
    assert found.upsamplers == ["upsampler-32", "upsampler-64"]
    assert set(found.components) == set(parts)
    assert found.clip == json.loads((parts["clip"] / "config.json").read_text())["fingerprint"]


def test_the_loaded_models_have_the_saved_weights(folder: Path, parts: dict[str, Path]):
    model = UnCLIP.load(folder)
    for name, loaded in (("prior", model.prior), ("decoder", model.decoder), ("upsampler-64", model.upsamplers[1])):
        saved = read_tensors(parts[name] / "model.safetensors")
        state = loaded.state_dict()
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[key], saved[key]) for key in saved)
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert model.sampling == SAMPLING


def test_a_release_is_the_same_bytes_each_time(parts: dict[str, Path], folder: Path, tmp_path: Path):
    save_release(tmp_path / "again", "tiny", parts, SAMPLING, {"embed": "abc"})
    assert (tmp_path / "again" / "release.json").read_bytes() == (folder / "release.json").read_bytes()


def test_a_release_can_be_moved(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    shutil.rmtree(folder)
    assert UnCLIP.load(tmp_path / "elsewhere").size == 64


def test_an_unknown_schema_is_refused_with_both_versions(folder: Path):
    change(folder, schema_version=7)
    with pytest.raises(Refused, match="version 7, and this unclip reads version 1"):
        check_release(folder)


def test_altered_and_missing_files_are_refused(folder: Path):
    weights = folder / "prior" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink()
    with pytest.raises(Refused, match=r"model\.safetensors is missing"):
        UnCLIP.load(folder)
    weights.write_bytes(data)
    with pytest.raises(Refused, match=r"model\.safetensors was altered"):
        UnCLIP.load(folder)


def test_a_component_that_leads_out_of_the_folder_is_refused(folder: Path):
    components = json.loads((folder / "release.json").read_text())["components"]
    change(folder, components=components | {"../elsewhere": components["prior"]})
    with pytest.raises(Refused, match="no part of a release"):
        check_release(folder)
    change(folder, components=components | {"prior": {"model.pkl": "0" * 64}})
    with pytest.raises(Refused, match=r"model\.pkl"):
        check_release(folder)


def test_a_prior_of_another_clip_is_refused_by_name(parts: dict[str, Path], tmp_path: Path):
    model = load_model(parts["prior"], "prior")
    save_model(tmp_path / "prior", "prior", TINY.prior, model.state_dict(), clip="feedfeedfeedfeed")
    with pytest.raises(Refused, match=r"the prior in .* was trained on embeddings of the CLIP feedfeedfeed"):
        save_release(tmp_path / "release", "tiny", parts | {"prior": tmp_path / "prior"}, SAMPLING)


def test_a_gap_in_the_cascade_is_refused(parts: dict[str, Path], tmp_path: Path):
    gap = {name: path for name, path in parts.items() if name != "upsampler-32"}
    sampling = {name: settings for name, settings in SAMPLING.items() if name != "upsampler-32"}
    with pytest.raises(Refused, match="takes pictures of 32 px, and the decoder gives 16 px"):
        save_release(tmp_path / "release", "tiny", gap, sampling)


def test_a_release_without_a_part_or_its_sampling_is_refused(parts: dict[str, Path], tmp_path: Path):
    with pytest.raises(Refused, match="has no prior"):
        save_release(tmp_path / "a", "tiny", {n: p for n, p in parts.items() if n != "prior"}, SAMPLING)
    with pytest.raises(Refused, match="says how to sample"):
        save_release(tmp_path / "b", "tiny", parts, {"prior": Sampling()})
    with pytest.raises(Refused, match="no part of a release"):
        save_release(tmp_path / "c", "tiny", parts | {"superresolver": parts["prior"]}, SAMPLING)


def test_a_model_folder_of_another_kind_or_with_unknown_settings_is_refused(parts: dict[str, Path], tmp_path: Path):
    with pytest.raises(Refused, match="holds a 'prior', and a 'decoder' was asked for"):
        load_model(parts["prior"], "decoder")
    shutil.copytree(parts["prior"], tmp_path / "prior")
    document = json.loads((tmp_path / "prior" / "config.json").read_text())
    document["config"]["wings"] = 2
    (tmp_path / "prior" / "config.json").unlink()
    (tmp_path / "prior" / "config.json").write_text(json.dumps(document))
    with pytest.raises(Refused, match="does not know: wings"):
        load_model(tmp_path / "prior", "prior")


def test_what_a_cascade_does_to_its_models_changes_no_byte_that_is_saved(tmp_path: Path):
    folder = write_release(tmp_path / "release")
    model = UnCLIP.load(folder)
    model.generate(["a red circle"])
    for name, part in {"decoder": model.decoder, **model.by_side}.items():
        save_model(tmp_path / name, name.split("-")[0], part.config, part.state_dict(), clip=None)
        saved = (tmp_path / name / "model.safetensors").read_bytes()
        assert saved == (folder / name / "model.safetensors").read_bytes()
