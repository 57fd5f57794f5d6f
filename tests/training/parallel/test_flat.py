"""What several ranks agree on, in processes of their own."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from infra.store.local import LocalStore
from tests.training.checkpoint.test_store import damage, put
from training.checkpoint.store import Checkpoints


def _resumed(rank: int, root: Path, answers: Any) -> None:
    """What each of two ranks would go on from, if it saw the store `root/<rank>`."""
    import torch.distributed

    from training.parallel.flat import Group
    from training.state import newest_checkpoint

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=2)
    for key in ("same", "newer", "none", "damaged"):
        try:
            found = newest_checkpoint(Checkpoints(LocalStore(root / str(rank)), key), Group(rank, 2))
            answers.put((key, rank, found and found.samples))
        except ValueError as error:
            answers.put((key, rank, str(error)))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_every_rank_goes_on_from_the_checkpoint_of_rank_0(tmp_path: Path) -> None:
    stores = [LocalStore(tmp_path / str(rank)) for rank in range(2)]
    for rank, store in enumerate(stores):
        store.check(create=True)
        for key in ("same", "newer", "damaged"):
            put(Checkpoints(store, key, 1), 8)
        put(Checkpoints(store, "same", 1), 16)
        put(Checkpoints(store, "damaged", 1), 16)
        if rank == 1:  # as if it were written between two looks
            put(Checkpoints(store, "newer", 1), 16)
            put(Checkpoints(store, "none", 1), 8)
    damage(stores[1], "checkpoints/damaged/000000000016-1/a")
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    ranks = [spawn.Process(target=_resumed, args=(rank, tmp_path, answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = {(key, rank): value for key, rank, value in (answers.get(timeout=60) for _ in range(8))}
    for process in ranks:
        process.join()
    assert [found["same", rank] for rank in range(2)] == [16, 16]
    assert [found["newer", rank] for rank in range(2)] == [8, 8]
    assert [found["none", rank] for rank in range(2)] == [None, None]
    assert found["damaged", 0] == 16
    assert "a is damaged" in found["damaged", 1]
