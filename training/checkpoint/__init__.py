"""A fit's state in the store, from which any number of workers goes on.

In go tensors by name and the step they belong to; out come checkpoints, believed only if every byte is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from training.checkpoint.dcp import load_dcp
    from training.checkpoint.files import explain_full_disk
    from training.checkpoint.saver import Saver
    from training.checkpoint.store import RELEASE, Checkpoint, Checkpoints, deliver_model, is_finished, job_identity
else:
    __getattr__ = exports(__name__)
