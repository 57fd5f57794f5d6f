"""Averages of several lengths in one run: two are tracked, their snapshots lie in the store, and when training ends
the averages that the recipe names are reconstructed from them; validation chooses the one that is released.

    checkpoints/<key>/averages/<sha256>   a snapshot: both averages; which ones belong to a run, its checkpoints say

A snapshot is named by its content, so that the attempts of a fit never meet at a name, and whoever goes on from a
checkpoint goes on with that checkpoint's snapshots.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from infra.documents import digest_file
from infra.errors import NotFound, Refused
from infra.store import Store
from training.optim.ema import PowerEma
from training.optim.posthoc import Average, combination, combined
from training.options import TrainConfig
from training.parallel import Group, Vectors, gather_state
from unclip.files import read_tensors, write_tensors

TRACKED = (0.05, 0.10)
"""Relative lengths that are tracked, as in the paper (section 3.2)."""

log = logging.getLogger(__name__)


class Averages:
    """The tracked averages of a run and the list of its snapshots; nothing where `ema_lengths` is empty."""

    def __init__(self, model: nn.Module, flat: Vectors, config: TrainConfig) -> None:
        self._config = config
        self._tracked = [PowerEma(model, flat, length) for length in TRACKED] if config.ema_lengths else []
        self.snapshots: list[tuple[int, str]] = []
        """(updates, SHA-256) of each snapshot, the oldest first."""

    def update(self, updates: int) -> None:
        """Takes in the model as it is after that many updates."""
        for average in self._tracked:
            average.update(updates)

    def due(self, step: int, updates: int) -> bool:
        """Whether a snapshot belongs after that step: `ema_snapshots` of them, evenly apart, the last at the end."""
        count, steps = self._config.ema_snapshots, self._config.steps
        fresh = updates > (self.snapshots[-1][0] if self.snapshots else 0)
        return bool(self._tracked) and fresh and step * count // steps > (step - 1) * count // steps

    def snapshot(self, store: Store, key: str, updates: int, group: Group) -> None:
        """Rank 0 writes one, after that many updates; every rank calls it, since each may have a part of it."""
        sha = ""
        tensors = gather_state(self.tensors().items(), keep=group.rank == 0)
        if group.rank == 0:
            with store.scratch() as folder:
                write_tensors(folder / "snapshot", tensors)
                sha = digest_file(folder / "snapshot")
                store.put_new(_name(key, sha), folder / "snapshot")
        self.snapshots = [*self.snapshots, (updates, group.agreed(sha))]

    def tensors(self) -> dict[str, Tensor]:
        """The tracked averages by length and name, views as `Ema.tensors`; empty where none is tracked."""
        return {f"{one.length}/{name}": tensor for one in self._tracked for name, tensor in one.tensors().items()}

    @property
    def head(self) -> dict[str, Any]:
        """The snapshots of this run, for a checkpoint's head; empty where none is tracked."""
        return {"averages": self.snapshots} if self._tracked else {}

    def load(self, head: dict[str, Any]) -> None:
        """The inverse of `head`; the averages are read into the views that `tensors` gives."""
        if self._tracked:
            self.snapshots = [(updates, sha) for updates, sha in head["averages"]]

    def reconstructed(self, store: Store, key: str, length: float) -> tuple[dict[str, Tensor], float]:
        """The average of that length as training ends, and how far its shares of the updates are missed.

        Snapshots that are damaged or gone are left out, with a warning; raises Refused where none is left.
        """
        found = [(updates, sha) for updates, sha in self.snapshots if _intact(store, _name(key, sha))]
        if not found:
            raise Refused(
                f"no snapshot of the weights' averages under checkpoints/{key}/ is intact: train again", code=5
            )
        kept = [Average(updates, one) for updates, _ in found for one in TRACKED]
        factors, missed = combination(kept, Average(self.snapshots[-1][0], length))

        def averages() -> Iterator[dict[str, Tensor]]:
            for _, sha in found:
                both = read_tensors(store.local(_name(key, sha)))
                yield from (_of(both, one) for one in TRACKED)

        base = _of(read_tensors(store.local(_name(key, found[-1][1]))), TRACKED[-1])
        return combined(list(factors), averages(), base), missed


def _name(key: str, sha: str) -> str:
    return f"checkpoints/{key}/averages/{sha}"


def _of(state: dict[str, Tensor], length: float) -> dict[str, Tensor]:
    prefix = f"{length}/"
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _intact(store: Store, name: str) -> bool:
    try:
        whole = digest_file(store.local(name)) == name.rpartition("/")[2]
    except NotFound:
        whole = False
    if not whole:
        log.warning("snapshot %s is damaged or gone: it is left out of the averages", name)
    return whole
