"""A folder as open_clip saves a model for the Hugging Face hub: open_clip_config.json, with its weights beside it.

Read without importing open_clip, which takes seconds; its own name for such a model is `local-dir:<folder>`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unclip.errors import Refused
from unclip.files import read_document

PREFIX = "local-dir:"
CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
"""Names of the weights, of which open_clip loads the first that is there."""


def files_of(name: str) -> tuple[Path, Path] | None:
    """(configuration, weights) of a model named local-dir:<folder>, None for any other name; Refused where one of the
    two is missing: open_clip itself would go on without weights, from random ones."""
    if not name.startswith(PREFIX):
        return None
    folder = Path(name.removeprefix(PREFIX)).expanduser()
    if not name.removeprefix(PREFIX) or not folder.is_dir():
        raise Refused(f"{name!r}: there is no such folder; name one that has {CONFIG} and {WEIGHTS[0]}")
    if not (folder / CONFIG).is_file():
        raise Refused(f"{folder} has no {CONFIG}, so it is no folder of open_clip's")
    found = [folder / weights for weights in WEIGHTS if (folder / weights).is_file()]
    if not found:
        raise Refused(f"{folder} has none of {', '.join(WEIGHTS)}: the model's weights are missing")
    return folder / CONFIG, found[0]


def model_config(path: Path) -> dict[str, Any]:
    """`model_cfg` of an open_clip_config.json: what `build_clip` builds; Refused where there is none."""
    try:
        document = read_document(path)
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read as JSON: {error}") from None
    model = document.get("model_cfg") if isinstance(document, dict) else None
    if not isinstance(model, dict):
        raise Refused(f"{path} has no model_cfg, which says how the model is built")
    return model
