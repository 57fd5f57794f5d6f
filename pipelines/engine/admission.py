"""Admission: which stages the cluster can never hold, which fits run at once, how many actors a pool gets."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from infra.cluster import ClusterInfo, Node
from infra.errors import Refused, Stopped
from pipelines.stage import Stage


def check_room(stages: Iterable[Stage], nodes: Sequence[Node], growth: Sequence[Node] = ()) -> None:
    """Raises Refused naming every stage of which no node holds a single task, process or (for a fit) worker, or which
    wants more workers at once than all nodes hold: an error beats a wait without end.

    nodes: what the cluster has now; growth: what its autoscaler may make of it, where Ray knows. Of a cluster that
    grows and does not say how far, what it has now is the limit. Nothing is checked without nodes.
    """
    wants, changes = [], []
    for stage in stages if nodes else ():
        how = stage.how
        cpus, gpus = getattr(how, "cpus", 1), getattr(how, "gpus", 0)
        units = how.fewest if stage.kind == "fit" else 1
        if stage.kind == "driver" or any(_holds(cluster, cpus, gpus) >= units for cluster in (nodes, growth)):
            continue
        unit = {"fit": f"{units} worker{'s' * (units > 1)}", "task": "a task", "actor": "a process"}[stage.kind]
        wants.append(f"{stage.name} wants {_amount(cpus, gpus)} for {unit}{' each' * (units > 1)}")
        section = getattr(stage, "section", "") or stage.group
        changes += [f"{section}.{name}" for name in ("workers", "cpus", "gpus") if getattr(how, name, 0)]
    if wants:
        has = "; ".join(f"{node.count:g} with {_amount(node.cpus, node.gpus)}" for node in (*nodes, *growth))
        raise Refused(
            f"the cluster is too small: {', '.join(wants)}. Its nodes: {has}. Ask for less ({', '.join(changes)}; "
            "--set KEY=VALUE), or connect to a larger cluster (--address)."
        )


def _holds(nodes: Iterable[Node], cpus: float, gpus: float) -> float:
    """How many units of that size these nodes hold at once, each whole on one of them."""
    return sum(node.holds(cpus, gpus) for node in nodes)


def _amount(cpus: float, gpus: float) -> str:
    shown = f"{cpus:g} CPU{'s' * (cpus != 1)}"
    return shown if not gpus or math.isinf(gpus) else f"{shown} and {gpus:g} GPU{'s' * (gpus != 1)}"


class Admission:
    """Lets fits start while their CPUs and GPUs fit into the cluster, first come, first served."""

    def __init__(self, cpus: float, gpus: float) -> None:
        self.total = {"CPU": cpus, "GPU": gpus}
        self.free = dict(self.total)
        self.waiting: list[object] = []
        self.changed = threading.Condition()
        self.closed = False

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
    """CPUs and GPUs that a fit takes from the cluster at least; an elastic one may be given more."""
    how = stage.how
    return {"CPU": how.fewest * how.cpus, "GPU": how.fewest * how.gpus}


def most_actors(info: ClusterInfo, cpus: float, gpus: float) -> int:
    """How many actors of so many CPUs and GPUs the cluster's nodes hold at once; at least 1."""
    return max(1, int(min(_holds(info.nodes, max(cpus, 0.1), gpus), 1e6)))
