"""What a stage is: a spec that goes into keys, a how that does not, actions to do, and how one is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from infra.errors import Refused
from infra.records import Action, Manifest, Record
from infra.store import Store
from unclip.config import AMOUNT, COUNT, WHOLE, outside
from unclip.errors import Refused as Impossible


class Stage(Protocol):
    """What the engine asks of a stage; an instance is picklable and small, since it travels to Ray workers.

    `StageBase` has what most stages share.
    """

    @property
    def name(self) -> str:
        """Unique in the graph: "filter-look"."""
        ...

    @property
    def group(self) -> str:
        """What the command line calls it: "filter"."""
        ...

    @property
    def version(self) -> int:
        """It rises when the bytes that the same spec and inputs give change."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the stages whose manifests `actions` takes, in that order."""
        ...

    @property
    def kind(self) -> str:
        """Where its actions are done: "task" (a Ray task each), "actor" (a pool of actors, each set up once), "driver"
        (the driver's thread: reduces over small things, the ledger) or "fit" (Ray Train, under a lease)."""
        ...

    @property
    def spec(self) -> Any:
        """All that decides its bytes beside its inputs; it goes into keys."""
        ...

    @property
    def how(self) -> Any:
        """How it is run; it goes into no key."""
        ...

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        """What is to be made from these manifests (in the order of `needs`). Pure: no store, no clock, no network."""
        ...

    def setup(self) -> None:
        """Once a process, before the first `run`: load CLIP, install the guard."""
        ...

    def run(self, action: Action, store: Store, out: Path) -> Record:
        """Does one action: files go to the empty folder `out`; returns `Record.of(action, out, …)` to be committed."""
        ...


class StageBase:
    """What most stages share. A stage is a frozen dataclass of this base: it says `name`, `needs`, `spec`, `how` and
    `run`, as fields where instances differ and as plain class attributes (without a type) where they do not.

    A stage may also have `preview_bytes()`: what its `run` would read, so that a plan may do it for itself;
    `carefully()`, of kind "task": itself as it does an action that ended its workers; `stale(record)`: whether a record
    is to have a next generation; `shards`: how many actions it has, where that is known without its inputs; and
    `unhashed_bytes`: why its inputs were not read, so that it can be planned and not run.
    """

    if TYPE_CHECKING:  # to be read only, as fields of frozen dataclasses and properties are

        @property
        def name(self) -> str: ...
        @property
        def group(self) -> str: ...
        @property
        def needs(self) -> tuple[str, ...]: ...
        @property
        def spec(self) -> Any: ...
        @property
        def how(self) -> Any: ...
        @property
        def version(self) -> int: ...
        @property
        def kind(self) -> str: ...
        @property
        def maps(self) -> str:
            """The stage of which each shard gives one action here."""

        @property
        def role(self) -> str:
            """What its manifest is to a trainer: rows, selection, statistics, clip; empty: its own name."""

        @property
        def step(self) -> str:
            """What a report calls the rows that it passes on, where the rows of a data set pass through it."""

        @property
        def section(self) -> str:
            """The recipe's section that says how it is run; empty: its group."""

    else:
        version, kind = 1, "driver"
        maps = role = step = section = ""

    def action(self, spec: Any, inputs: Iterable[str]) -> Action:
        """One of this stage's actions, on inputs that digests or versions name."""
        return Action(f"{self.name}/{self.version}", spec, tuple(inputs))

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        """One in all, on the versions of its inputs."""
        yield self.action(plain(self.spec), (manifest.version for manifest in inputs))

    def setup(self) -> None:
        """Nothing to set up."""


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
def error_context(where: str) -> Iterator[None]:
    """What is refused inside is refused with `where` before it."""
    try:
        yield
    except (Refused, Impossible) as error:
        raise Refused(f"{where}: {error}", code=getattr(error, "code", 2)) from error
