"""Tensors of a checkpoint on their way to the store."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from infra.errors import EXPECTED, Unavailable, advice
from infra.store import with_retries
from training.checkpoint.store import Checkpoints, Written


def put_tensors(checkpoints: Checkpoints, samples: int, name: str, tensors: Mapping[str, Tensor]) -> Written | None:
    """Puts a safetensors file of a checkpoint; None as `Checkpoints.put`."""
    from safetensors.torch import save_file

    def put() -> Written | None:
        with checkpoints.store.scratch() as folder:
            with explain_full_disk(folder):
                save_file({key: tensors[key] for key in sorted(tensors)}, folder / name)
            return checkpoints.put(samples, name, folder / name)

    return with_retries(checkpoints.store, put)


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Around what writes files in a folder: a full disk is `Unavailable`, by whichever of the libraries it was met."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        said = re.search(r"os error (\d+)", str(error))
        number = getattr(error, "errno", None) or (int(said[1]) if said else 0)
        if number not in EXPECTED:
            raise
        why = advice(OSError(number, os.strerror(number)))
        raise Unavailable(f"{folder}, where a checkpoint is made: {why}") from error
