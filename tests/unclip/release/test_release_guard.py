"""What a release folder could do to whoever opens it: damage, strangers, pickles, code. Each is refused or ignored."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.fixtures.hostile import rewrite, signed
from tests.fixtures.release import MODEL, SAMPLING
from unclip import UnCLIP
from unclip.clip.model import Clip, build_clip
from unclip.errors import Refused
from unclip.models.decoder import Decoder
from unclip.models.prior import DiffusionPrior
from unclip.presets import TINY
from unclip.release.folder import check_release, save_release
from unclip.release.model import load_model, read_model_config, save_model


def test_every_file_of_a_release_is_missed_and_every_changed_byte_seen(folder: Path):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "release.json"]
    assert len(files) == 3 + 2 * 4
    for path in files:
        data = path.read_bytes()
        for place in (0, len(data) // 2, len(data) - 1):
            rewrite(path, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(Refused, match=rf"{path.parent.name}/{path.name} was altered"):
                UnCLIP.load(folder)
        rewrite(path, data[:-1])
        with pytest.raises(Refused, match="was altered"):
            UnCLIP.load(folder)
        path.unlink()
        with pytest.raises(Refused, match=rf"{path.name} is missing"):
            UnCLIP.load(folder)
        path.write_bytes(data)
    assert UnCLIP.load(folder).size == 64


@pytest.mark.parametrize("component", ["clip", "prior", "decoder", "upsampler-64"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(folder: Path, component: str, value: float, tmp_path: Path):
    state = load_file(folder / component / "model.safetensors")
    name = next(name for name, tensor in state.items() if tensor.is_floating_point() and tensor.ndim)
    state[name].flatten()[-1] = value
    save_file(state, tmp_path / "bad.safetensors")
    signed(folder, f"{component}/model.safetensors", (tmp_path / "bad.safetensors").read_bytes())
    with pytest.raises(Refused, match=rf"{component}/model.safetensors holds numbers that are not finite, in {name}"):
        UnCLIP.load(folder)


@pytest.mark.parametrize("kind", ["prior", "decoder"])
@pytest.mark.parametrize(("field", "width"), [("embedding", 48), ("text_width", 48), ("context", 32)])
def test_models_of_another_width_are_refused_with_both_numbers(parts, tmp_path: Path, kind, field, width):
    config = replace({"prior": TINY.prior, "decoder": TINY.decoder}[kind], **{field: width})
    model = {"prior": DiffusionPrior, "decoder": Decoder}[kind](config)
    clip = read_model_config(parts[kind], kind)[1]
    save_model(tmp_path / kind, kind, config, model.state_dict(), clip=clip)
    with pytest.raises(Refused, match=rf"this {kind} was made for {field} {width}, and CLIP's is \d+"):
        save_release(tmp_path / "release", "tiny", parts | {kind: tmp_path / kind}, SAMPLING)


def test_an_exchanged_clip_is_refused_though_it_fits(folder: Path, tmp_path: Path):
    """The same widths, other weights: pictures would be of nothing that was asked for."""
    torch.manual_seed(1)
    Clip.of(build_clip(MODEL), MODEL).save(tmp_path / "other")
    for file in (tmp_path / "other").iterdir():
        signed(folder, f"clip/{file.name}", file.read_bytes())
    with pytest.raises(Refused, match=r"was released with the CLIP \w+…, and holds the CLIP"):
        UnCLIP.load(folder)
    document = json.loads((folder / "release.json").read_text())
    document["clip"] = json.loads((tmp_path / "other" / "config.json").read_text())["fingerprint"]
    rewrite(folder / "release.json", json.dumps(document).encode())
    with pytest.raises(Refused, match=r"the decoder in .* was trained on embeddings of the CLIP"):
        UnCLIP.load(folder)


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


WATCHED: list[tuple[str, str]] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if WATCHED is not None and event in ("open", "exec", "compile", "import", "pickle.find_class"):
        named = arguments[0].co_filename if event == "exec" else arguments[1 if event in ("compile",) else 0]
        WATCHED.append((event, str(named)))


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """What the interpreter itself says of files opened, code run and pickles read (PEP 578)."""
    global WATCHED
    if not getattr(sys, "_unclip_audit", False):
        sys.addaudithook(_audit)
        sys._unclip_audit = True  # type: ignore[attr-defined]  # a hook stays for good
    WATCHED = seen = []
    try:
        yield seen
    finally:
        WATCHED = None


def test_pickles_and_code_in_the_folder_are_never_opened(folder: Path, tmp_path: Path, monkeypatch):
    mark = tmp_path / "exploded"
    code = f"import os; os.mkdir({str(mark)!r})\n"
    for place in (folder, *(folder / name for name in ("clip", "prior", "decoder", "upsampler-64"))):
        for name in ("model.pkl", "pytorch_model.bin", "model.pt", "model.ckpt"):
            (place / name).write_bytes(pickle.dumps(Bomb(mark)))
        for name in ("__init__.py", "modeling.py", "torch.py", "sitecustomize.py", "conftest.py"):
            (place / name).write_text(code)
    monkeypatch.chdir(folder)
    with watched() as seen:
        UnCLIP.load(folder).generate(["a red circle"])
    inside = {Path(name).name for event, name in seen if name.startswith(str(folder))}
    assert {"release.json", "config.json", "merges.txt"} <= inside <= {
        "release.json", "config.json", "merges.txt", "model.safetensors",
    }  # fmt: skip
    assert not [found for found in seen if found[0] == "pickle.find_class"]
    assert not [found for found in seen if found[0] in ("exec", "compile") and str(folder) in found[1]]
    assert not mark.exists()


def test_a_pickle_under_the_name_of_weights_is_refused_unread(folder: Path, tmp_path: Path):
    mark = tmp_path / "exploded"
    torch.save({"out.bias": Bomb(mark)}, tmp_path / "weights.pt")
    for data in (pickle.dumps(Bomb(mark)), (tmp_path / "weights.pt").read_bytes()):
        signed(folder, "decoder/model.safetensors", data)
        with pytest.raises(Refused, match="no readable safetensors file"):
            UnCLIP.load(folder)
    assert not mark.exists()


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.floats(), st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a JSON document."""
    if path:
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def altered(data: st.DataObject, document: Any) -> Any:
    """The document with one thing in it taken away or replaced."""
    *way, last = data.draw(st.sampled_from(list(places(document))))
    inner = document
    for key in way:
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[last] = data.draw(JUNK)
    else:
        del inner[last]
    return document


def loads_or_refuses(call: Callable[[], object]) -> None:
    """Whatever else it raises fails the test."""
    with suppress(Refused):
        call()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_release_json_says_it_is_followed_or_refused(folder: Path, data: st.DataObject):
    whole = (folder / "release.json").read_bytes()
    rewrite(folder / "release.json", json.dumps(altered(data, json.loads(whole))).encode())
    try:
        loads_or_refuses(lambda: check_release(folder))
    finally:
        rewrite(folder / "release.json", whole)


@pytest.mark.parametrize("component", ["clip", "prior", "decoder", "upsampler-32"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_models_config_says_it_is_followed_or_refused(folder: Path, component: str, data: st.DataObject):
    file = folder / component / "config.json"
    whole = file.read_bytes()
    rewrite(file, json.dumps(altered(data, json.loads(whole))).encode())
    try:
        if component == "clip":
            loads_or_refuses(lambda: Clip.load(folder / component).encode_text(["a red circle"]))
        else:
            loads_or_refuses(lambda: load_model(folder / component, component.split("-")[0]))
    finally:
        rewrite(file, whole)


def test_a_folder_is_not_harmed_by_being_loaded(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "before")
    UnCLIP.load(folder).generate(["a red circle"])
    for path in (tmp_path / "before").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (folder / path.relative_to(tmp_path / "before")).read_bytes()
