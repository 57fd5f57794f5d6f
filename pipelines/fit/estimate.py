"""What the fits of a recipe ask of the machine, before any starts: operations, memory, time and price."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from infra.errors import Refused
from pipelines.stage import Stage
from training.options import KINDS, TrainConfig
from unclip.config import AMOUNT, POSITIVE, Range, outside

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """A kind of device: what its maker and your provider say of it, and what training was seen to reach."""

    tflops: float
    """Its peak at the precision that you train in, in 10¹² operations a second (dense)."""
    memory_gib: float
    """Its memory in GiB."""
    hourly: float = 0.0
    """Price of one for an hour, in a currency of yours."""
    reached: float = 0.35
    """Share of that peak that training reaches, in (0, 1]."""

    def __post_init__(self) -> None:
        share = Range(0, 1, above=True)
        if wrong := outside(self, tflops=POSITIVE, memory_gib=POSITIVE, hourly=AMOUNT, reached=share):
            raise Refused(wrong)


@dataclass(frozen=True)
class Time:
    """A fit on devices of one kind."""

    hours: float
    price: float
    """Of all its devices for that time."""
    memory: int
    """Bytes a worker: weights, gradient, moments, average, and what a micro-batch keeps for its backward pass, at the
    fit's precision and with `recompute` if it is on; of a model that is sharded there, its share of the first four."""
    fits: bool
    """Whether there is so much."""


@dataclass(frozen=True)
class Need:
    """What one fit takes."""

    stage: str
    parameters: int
    flops: int
    """Of one sample's forward and backward pass."""
    samples: int
    """Seen in the whole training."""
    memory: int
    """Bytes a worker, of the whole model: what a machine of unknown size needs."""
    devices: float
    on: dict[str, Time]
    """By kind of accelerator."""


def needs(stages: Sequence[Stage], hardware: Mapping[str, Accelerator]) -> list[Need]:
    """What each of these stages that trains would take, on each of these accelerators."""
    return [_need(stage, hardware) for stage in stages if stage.kind == "fit"]


def _need(stage: Any, hardware: Mapping[str, Accelerator]) -> Need:
    from training.cost import cost
    from training.learner import is_sharded

    config: TrainConfig = KINDS[stage.model].options(**stage.spec.train)
    one = cost(
        stage.model,
        stage.spec.model,
        getattr(config, "crop", None),
        precision=config.precision,
        recompute=stage.how.recompute,
        gpu=bool(hardware or stage.how.gpus),
    )
    workers, whole_batch = stage.how.workers, KINDS[stage.model].whole_batch
    at_once = -(-config.batch // workers) if whole_batch else config.micro_size

    def memory(room: float) -> int:
        sharded = is_sharded(
            stage.how, config, whole_batch=whole_batch, parameters=one.parameters, ranks=workers, room=room
        )
        return one.memory(at_once, workers if sharded else 1)

    samples, devices = config.steps * config.batch, workers * (stage.how.gpus or 1)
    on = {}
    for name, kind in hardware.items():
        hours = samples * (one.flops + one.again) / (devices * kind.tflops * 1e12 * kind.reached) / 3600
        needed, there = memory(kind.memory_gib * GIB), kind.memory_gib * GIB
        on[name] = Time(hours, hours * devices * kind.hourly, needed, needed <= there)
    return Need(stage.name, one.parameters, one.flops, samples, memory(math.inf), devices, on)


def as_json(found: Sequence[Need]) -> list[dict[str, Any]]:
    """`[{"stage", "parameters", "flops", "samples", "memory", "devices", "on": {NAME: {"hours", "price", …}}}]`"""
    return [asdict(need) for need in found]


def as_table(found: Sequence[Need]) -> Any:
    """The same as a person reads it: a table of rich."""
    from rich.table import Table

    names = list(found[0].on) if found else []
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("to train")
    for title in ("FLOPs a sample", "samples", "memory a worker", "devices", *names):
        table.add_column(title, justify="right")
    for need in found:
        row = [count(need.flops), count(need.samples), f"{need.memory / GIB:.3g} GiB"]
        table.add_row(need.stage, *row, f"{need.devices:g}", *(_told(need.on[name]) for name in names))
    if len(found) > 1 and any(time.price for need in found for time in need.on.values()):
        sums = (sum(need.on[name].price for need in found) if all(need.on[name].fits for need in found) else 0.0
                for name in names)  # fmt: skip
        table.add_row("all", *[""] * 4, *(f"{price:,.0f}" if price else "" for price in sums), style="dim")
    return table


def _told(time: Time) -> str:
    if not time.fits:
        return f"too small: {time.memory / GIB:.3g} GiB"
    price = f", {time.price:,.0f}" if time.price else ""
    return span(time.hours) + price


def span(hours: float) -> str:
    """A time in words: seconds to days."""
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:,.1f} days"


def count(number: float) -> str:
    """A large number in three digits: 3.46 B, 6.66 T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
