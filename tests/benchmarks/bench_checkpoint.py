"""How long the loop stands still for a checkpoint of 1 GB, written after the step against beside training, and how much
slower the steps are meanwhile.

Run with `make bench`. Time on the clock counts here, since standing still is waiting: quartiles over a few saves.
UNCLIP_BENCH_CHECKPOINT_MB sets another size of the state.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import torch

from infra.store.local import LocalStore
from training.checkpoint.saver import Saver
from training.checkpoint.store import Checkpoints
from training.parallel.flat import Group

MEGABYTES = int(os.environ.get("UNCLIP_BENCH_CHECKPOINT_MB", "1024"))
SAVES = 3


def state() -> dict[str, torch.Tensor]:
    """Weights, average and two moments of a model, 64 tensors in all."""
    return {f"tensor.{number}": torch.randn(MEGABYTES << 20 >> 8) for number in range(64)}


def step(matrix: torch.Tensor) -> None:
    """The forward and backward passes of a step, about a second."""
    for _ in range(25):
        matrix @ matrix


def stands_still(root: Path, overlap: bool) -> tuple[list[float], list[float], list[float]]:
    """Seconds that the loop waits for each of a few saves; seconds of the steps beside them, and of steps alone."""
    tensors, matrix = state(), torch.randn(1024, 1024)
    store = LocalStore(root)
    store.check(create=True)
    waited, beside, alone = [], [], []
    with Saver(Checkpoints(store, f"bench-{overlap}", 1, keep=1), Group(), overlap=overlap) as saver:
        saver.save(0, tensors, {})  # its buffers come into being
        saver.wait()
        for number in range(1, SAVES + 1):
            for _ in range(3):
                began = time.perf_counter()
                step(matrix)
                alone.append(time.perf_counter() - began)
            began = time.perf_counter()
            saver.save(number, tensors, {})
            stood = time.perf_counter() - began
            while True:
                began = time.perf_counter()
                step(matrix)
                beside.append(time.perf_counter() - began)
                began = time.perf_counter()
                saver.before_update()
                stood += time.perf_counter() - began
                if not saver.writing:
                    break
            waited.append(stood)
    return waited, beside, alone


def test_the_loop_stands_still_for_a_twentieth_of_a_checkpoint_at_most(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    (after, _, _), (beside, slowed, alone) = (stands_still(tmp_path, overlap) for overlap in (False, True))
    ratio = statistics.median(beside) / statistics.median(after)
    slower = statistics.median(slowed) / statistics.median(alone)
    print(
        f"\ncheckpoint of {MEGABYTES} MB: the loop stands still for {statistics.median(beside) * 1000:.0f} ms of "
        f"{statistics.median(after):.2f} s ({ratio:.3f}, medians of {SAVES}); steps meanwhile take {slower:.2f} of "
        f"their time ({len(slowed)} against {len(alone)} steps)"
    )
    assert ratio <= 1 / 20
