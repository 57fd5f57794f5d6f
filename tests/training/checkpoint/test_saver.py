from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from infra.errors import Refused
from infra.store.local import LocalStore
from training.checkpoint.saver import Saver
from training.checkpoint.store import Checkpoints
from training.parallel.flat import Group
from unclip.files import read_tensors


class Slow(LocalStore):
    """A store that takes nothing until it may."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        object.__setattr__(self, "may", threading.Event())

    def put_new(self, name: str, data: bytes | Path) -> bool:
        assert self.may.wait(10)  # type: ignore[attr-defined]
        return super().put_new(name, data)


@pytest.fixture
def store(tmp_path: Path) -> Slow:
    store = Slow(tmp_path / "store")
    store.check(create=True)
    return store


def values(checkpoints: Checkpoints) -> dict[int, float]:
    """Samples → the one number of each checkpoint."""
    read = map(checkpoints.read, checkpoints._places())
    return {found.samples: float(read_tensors(*found.files.values())["x"][0]) for found in read}


def test_what_is_saved_is_the_state_of_the_save_though_training_goes_on_meanwhile(store):
    checkpoints, state = Checkpoints(store, "key", 1), {"x": torch.full((1 << 20,), 1.0)}
    with Saver(checkpoints, Group()) as saver:
        saver.save(8, state, {})
        saver.before_update()
        state["x"].fill_(2.0)
        assert checkpoints.newest() is None  # nothing is written yet, and the loop was not held
        store.may.set()
        saver.save(16, state, {})
        assert values(checkpoints)[8] == 1.0  # the first is whole before the second begins
        saver.wait()
    assert values(checkpoints) == {8: 1.0, 16: 2.0}


def test_a_fit_that_ends_meanwhile_lets_the_checkpoint_end(store):
    checkpoints = Checkpoints(store, "key", 1)
    threading.Timer(0.2, store.may.set).start()
    with Saver(checkpoints, Group()) as saver:
        saver.save(8, {"x": torch.zeros(4)}, {})
    assert checkpoints.newest().samples == 8


def test_a_store_that_takes_nothing_is_told_by_the_next_save(store):
    def full(name: str, data: bytes | Path) -> bool:
        raise Refused("no room", code=5)

    object.__setattr__(store, "put_new", full)
    with Saver(Checkpoints(store, "key", 1), Group()) as saver:
        saver.save(8, {"x": torch.zeros(4)}, {})
        saver.before_update()  # an update is not held up by it
        with pytest.raises(Refused, match="no room"):
            saver.save(16, {"x": torch.zeros(4)}, {})
