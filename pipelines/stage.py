"""What a stage is: a spec that goes into keys, a how that does not, actions to do, and how one is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from infra.errors import Refused
from infra.records import Action, Manifest, Record
from infra.store import Store
from unclip.config import AMOUNT, COUNT, WHOLE, outside
from unclip.errors import Refused as Impossible


class Stage(Protocol):
    """One step of the workflow; an instance is picklable and small, since it travels to Ray workers.

    `name` is unique in the graph ("filter-look"), `group` is what the command line calls it ("filter").
    `version` rises when the bytes that the same spec and inputs give change.
    `needs` names the stages whose manifests `actions` takes, in that order.
    `maps`, where a stage has it, names the one of which each shard gives one action here.
    `preview_bytes()`, where a stage has it, is what its `run` would read, so that a plan may do it for itself.
    `kind`: "task" (Ray task each), "actor" (a pool of actors, each set up once), "driver" (runs in the driver's thread:
    reduces over small things, ledger) or "fit" (Ray Train, started from a thread of the driver under a lease).
    One of kind "task" may have `carefully()`: itself as it does an action that ended its workers.
    """

    name: str
    group: str
    version: int
    needs: tuple[str, ...]
    kind: str
    spec: Any
    how: Any

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        """What is to be made from these manifests (in the order of `needs`). Pure: no store, no clock, no network."""
        ...

    def setup(self) -> None:
        """Once a process, before the first `run`: load CLIP, install the guard."""
        ...

    def run(self, action: Action, store: Store, out: Path) -> Record:
        """Does one action: files go to the empty folder `out`; returns `Record.of(action, out, …)` to be committed."""
        ...


@dataclass(frozen=True)
class PoolHow:
    """Who does the actions of a stage of kind "actor". Values are the same for the same number of threads on the same
    type of device."""

    actors: int = 0
    """Processes, each with the models of its own; 0: as many as the cluster's CPUs (or GPUs) hold."""
    threads: int = 1
    """Torch threads of each."""
    cpus: float = 1
    """CPUs that Ray reserves for each."""
    gpus: float = 0
    """GPUs that Ray reserves for each; with any, the models live on the first."""

    def __post_init__(self) -> None:
        if wrong := outside(self, actors=WHOLE, threads=COUNT, cpus=AMOUNT, gpus=AMOUNT):
            raise Refused(wrong)


def plain(spec: Any) -> Any:
    """A frozen dataclass (or mapping, tuple, scalar) as plain JSON, for `Action.spec`.

    A field whose metadata says `later` is left out at its default: the keys of what was made before it stay valid. One
    whose metadata says `how` is left out always: a digest beside it says what is there.
    """
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        values = {field: getattr(spec, field.name) for field in dataclasses.fields(spec)}
        return {
            field.name: plain(value)
            for field, value in values.items()
            if not field.metadata.get("how") and not (field.metadata.get("later") and value == field.default)
        }
    if isinstance(spec, dict):
        return {str(key): plain(value) for key, value in spec.items()}
    if isinstance(spec, (list, tuple)):
        return [plain(value) for value in spec]
    return spec


@contextmanager
def blaming(where: str) -> Iterator[None]:
    """What is refused inside is refused with `where` before it."""
    try:
        yield
    except (Refused, Impossible) as error:
        raise Refused(f"{where}: {error}", code=getattr(error, "code", 2)) from error


ROLES = {
    "download": "rows",
    "filter": "selection",
    "embed": "rows",
    "curate": "selection",
    "statistics": "statistics",
    "clip": "clip",
    "decoder": "start",
}
"""What a manifest is to a trainer, by the stage that made it."""
