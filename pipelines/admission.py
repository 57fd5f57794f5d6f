"""Which fits may run at once: as many as the cluster's CPUs and GPUs hold, first come, first served."""

from __future__ import annotations

import threading
from typing import Any

from infra.errors import Refused, Stopped


class Admission:
    """Lets fits start while their CPUs and GPUs fit into the cluster, first come, first served."""

    def __init__(self, cpus: float, gpus: float) -> None:
        self.total = {"CPU": cpus, "GPU": gpus}
        self.free = dict(self.total)
        self.waiting: list[object] = []
        self.changed = threading.Condition()
        self.closed = False

    def check(self, name: str, need: dict[str, float]) -> None:
        """Raises Refused where the cluster could never hold it: an error beats a wait without end."""
        for resource, amount in need.items():
            if amount > self.total[resource] + 1e-9:
                raise Refused(
                    f"{name} wants {amount:g} {resource}, and the cluster has {self.total[resource]:g}. "
                    f"Ask for less (--set {name.replace('-', 's.', 1) if 'upsampler' in name else name}.workers=…) "
                    "or connect to a larger cluster (--address)."
                )

    def enter(self, need: dict[str, float]) -> None:
        """Blocks until it is this one's turn and its resources are free, and takes them; Stopped once closed."""
        turn = object()
        with self.changed:
            self.waiting.append(turn)
            self.changed.wait_for(
                lambda: (
                    self.closed or (self.waiting[0] is turn and all(self.free[r] + 1e-9 >= n for r, n in need.items()))
                )
            )
            self.waiting.remove(turn)
            if self.closed:
                raise Stopped("stopped before it began")
            for resource, amount in need.items():
                self.free[resource] -= amount
            self.changed.notify_all()

    def leave(self, need: dict[str, float]) -> None:
        """Gives them back."""
        with self.changed:
            for resource, amount in need.items():
                self.free[resource] += amount
            self.changed.notify_all()

    def close(self) -> None:
        """Lets nobody in any more; those who wait are told so."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()


def needs_of(stage: Any) -> dict[str, float]:
    """CPUs and GPUs that a fit takes from the cluster."""
    how = stage.how
    return {"CPU": how.workers * how.cpus, "GPU": how.workers * how.gpus}


def most_actors(info: Any, cpus: float, gpus: float) -> int:
    """How many actors of so many CPUs and GPUs the cluster of that info holds at once; at least 1."""
    by_cpus = info.cpus / max(cpus, 0.1)
    by_gpus = info.gpus / gpus if gpus else by_cpus
    return max(1, int(min(by_cpus, by_gpus) + 1e-9))
