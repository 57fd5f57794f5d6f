"""Checkpoints of a state on a GPU: what is written is the state of the save, though it changes right after; and how
how long the loop stands still.

    python -m tests.gpu.check_saving [--device cuda] [--megabytes 4096] [--saves 5]

Needs torch, safetensors and NumPy alone. Every save is read back and compared; prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from infra.store.local import LocalStore
from training.checkpoint.saver import Saver
from training.checkpoint.store import Checkpoints
from training.parallel.flat import Group
from unclip.files import read_tensors


def check(device: torch.device, megabytes: int, saves: int, root: Path) -> dict[str, float]:
    """Saves between updates that are queued on the device; raises AssertionError where a save holds another state."""
    store = LocalStore(root)
    store.check(create=True)
    checkpoints = Checkpoints(store, "gpu", 1)
    state = {f"tensor.{number}": torch.zeros(megabytes << 20 >> 6, device=device) for number in range(16)}
    matrix = torch.randn(4096 if device.type == "cuda" else 256, 4096, device=device)
    stood = []
    with Saver(checkpoints, Group()) as saver:
        for number in range(1, saves + 1):
            for tensor in state.values():
                tensor.fill_(number)
            began = time.perf_counter()
            saver.save(number, state, {})
            stood.append(time.perf_counter() - began)
            matrix @ matrix.T  # the next micro-batch
            began = time.perf_counter()
            saver.before_update()
            stood[-1] += time.perf_counter() - began
            for tensor in state.values():  # an update, which the copy must not see
                tensor.zero_()
            saver.wait()
            found = checkpoints.newest()
            assert found is not None
            (path,) = found.files.values()
            assert all(bool((tensor == number).all()) for tensor in read_tensors(path).values()), f"save {number}"
    return {"megabytes": megabytes, "first_ms": stood[0] * 1000, "median_ms": statistics.median(stood[1:]) * 1000}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--megabytes", type=int, default=4096)
    parser.add_argument("--saves", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(check(torch.device(arguments.device), arguments.megabytes, arguments.saves, Path(folder))))
