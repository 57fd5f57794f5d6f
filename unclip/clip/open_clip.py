"""open_clip's model classes without all that its package imports beside them.

`import open_clip.model` runs the package's __init__ first: timm with wandb, transformers, and through torchvision's
operators torch's compiler, 4 of the 6 seconds of a core that each worker with a CLIP would spend before its first row.
open_clip itself does without timm and transformers; of torchvision it wants one class, for freezing batch norms, which
nobody here does.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from unclip.errors import Refused

PACKAGE = "unclip_open_clip"
"""What the files are called here, so that `import open_clip` still gives the whole package."""
PARTS = ("utils", "pos_embed", "hf_configs", "hf_model", "modified_resnet", "timm_model", "transformer", "model")
"""Files of open_clip, each behind those that it imports."""
OPTIONAL = ("timm", "transformers")
FREEZING = "torchvision.ops.misc"


def model_module(config: Mapping[str, Any]) -> ModuleType:
    """The module open_clip.model, bare where a CLIP of this configuration needs no more (that is, no timm).

    Raises Refused where open_clip is not installed.
    """
    if "open_clip.model" in sys.modules or config["vision_cfg"].get("timm_model_name"):
        return importlib.import_module("open_clip.model")
    return bare_module()


@cache
def bare_module() -> ModuleType:
    """open_clip.model without its package and what is optional to it; raises Refused where it is not installed."""
    found = importlib.util.find_spec("open_clip")
    if found is None or found.origin is None:
        raise Refused("open_clip is not installed; install unclip with its dependencies")
    folder = Path(found.origin).parent
    package = ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    for part in PARTS:
        name = f"{PACKAGE}.{part}"
        spec = importlib.util.spec_from_file_location(name, folder / f"{part}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # An import statement asks its own module's builtins, so no other thread's imports are any different meanwhile.
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _spare}
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[f"{PACKAGE}.model"]


def _spare(
    name: str,
    globals: Mapping[str, object] | None = None,
    locals: Mapping[str, object] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> Any:
    """`__import__`, for which timm and transformers are not there, and torchvision has nothing but the name wanted."""
    if level == 0 and name.partition(".")[0] in OPTIONAL:
        raise ImportError(f"{name} is left out", name=name)
    if level == 0 and name == FREEZING:
        return SimpleNamespace(FrozenBatchNorm2d=None)
    return builtins.__import__(name, globals, locals, fromlist or (), level)
