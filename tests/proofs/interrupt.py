"""Runs that are interrupted and go on, against runs that are not: a grid of workers × moments × ways to end.

    python -m tests.proofs.interrupt --out DIR [--minutes 60]

Workers: the whole model on 1, 2 or 3 (flat), shards of it on 2 (FSDP2). Moments: between two micro-batches,
at an epoch's edge, while a checkpoint is written. Ends: kill -9 of a worker, SIGTERM to a worker, and 3 of which one is
killed, two that go on until one gets SIGTERM, and three again. What is compared: weights, averages and moments
one step before the end, the released model, metrics by step, and the uids of every micro-batch. All must be bitwise the
undisturbed run's where the number of workers stays; where it changes, uids are, and numbers agree to `CLOSE`.

Workers are processes over gloo, without Ray. A cell that is done (DIR/<cell>.json) is not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from infra.store.local import LocalStore
from tests.fixtures.fits import tiny
from tests.proofs.interrupt_ranks import BATCH, MICRO, Attempt, Strike, attempt
from training.checkpoint.store import Checkpoint, Checkpoints
from training.data.batches import Data, Reads
from training.data.order import derive_seed
from training.job import Job
from unclip.files import read_tensors

STEPS = 18
CLOSE = {"rtol": 1e-3, "atol": 1e-5}
TIMED = ("samples_per_s", "time/", "mfu")
"""Metrics that are of the clock."""
WORLDS = {"flat-1": (1, "flat"), "flat-2": (2, "flat"), "flat-3": (3, "flat"), "fsdp-2": (2, "fsdp")}
MOMENTS = ("accumulation", "epoch", "checkpoint")
ENDS = ("kill", "term")


@dataclass(frozen=True)
class Cell:
    """One run that is interrupted: its attempts, and the undisturbed run that it must equal."""

    name: str
    attempts: tuple[Attempt, ...]
    like: str
    exact: bool


def cells(edges: tuple[int, int]) -> list[Cell]:
    """The grid; edges: the steps in which the first two epochs end."""
    found = []
    for moment in MOMENTS:
        first, second = {"accumulation": (5, 12), "epoch": edges, "checkpoint": (8, 12)}[moment]
        for world, (ranks, shard) in WORLDS.items():
            for end in ENDS:
                number = signal.SIGKILL if end == "kill" else signal.SIGTERM
                struck = Attempt(ranks, shard, Strike(moment, first, number))
                found.append(Cell(f"{world}-{moment}-{end}", (struck, Attempt(ranks, shard)), world, True))
        for shard in ("flat", "fsdp"):
            three = Attempt(3, shard, Strike(moment, first, signal.SIGKILL))
            two = Attempt(2, shard, Strike(moment, second, signal.SIGTERM))
            found.append(Cell(f"{shard}-3-2-3-{moment}", (three, two, Attempt(3, shard)), "flat-1", False))
    return found


def job_of(folder: Path) -> Job:
    """A prior with dropout on the tiny store, which is made in that folder."""
    data = tiny(folder)
    train = {"steps": STEPS, "batch": BATCH, "micro": MICRO, "warmup": 3, "window": 3, "eps": 1e-3}
    made = data.job("prior", "fit", **train)
    return replace(made, model={**made.model, "dropout": 0.2})


def edges_of(store: LocalStore, job: Job) -> tuple[int, int]:
    """The steps in which the first two epochs end."""
    rows = sum(Data(store, job.data["rows"], job.data["selection"], Reads()).counts)
    return (rows - 1) // BATCH, (2 * rows - 1) // BATCH


@dataclass(frozen=True)
class Outcome:
    """What a run gave."""

    tensors: dict[str, torch.Tensor]
    """Weights, averages and moments one step before the end, and the released model."""
    metrics: dict[int, dict[str, float]]
    uids: dict[tuple[int, int], list[str]]
    """By (step, lane)."""


def run(folder: Path, base: Path, job: Job, attempts: tuple[Attempt, ...]) -> Outcome:
    """Makes those attempts one after the other on a store of their own; raises where one does not end as it should."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    for number, one in enumerate(attempts):
        met = attempt(folder, job, one, number)
        expected = "finished" if one.strike is None else "killed" if one.strike.signal == signal.SIGKILL else "stopped"
        if met != expected:
            raise SystemExit(f"{folder.name}: attempt {number} {met}, and should have {expected}")
    return outcome(folder, job)


def outcome(folder: Path, job: Job) -> Outcome:
    """Reads what a finished run left; what was done twice must have given the same twice."""
    checkpoints = Checkpoints(LocalStore(folder), job.key)
    last, before = (checkpoints.read(place) for place in checkpoints._places()[:2])
    if (last.samples, before.samples) != (STEPS * BATCH, (STEPS - 1) * BATCH):
        raise SystemExit(f"{folder.name}: checkpoints of {last.samples} and {before.samples} samples")
    released = read_tensors(last.files["release/model.safetensors"])
    tensors = whole(before) | {f"released.{name}": tensor for name, tensor in released.items()}
    names = {derive_seed("noise", job.config.seed, s, m): (s, m) for s in range(STEPS) for m in range(BATCH // MICRO)}
    metrics: dict[int, dict[str, float]] = {}
    uids: dict[tuple[int, int], list[str]] = {}
    for path in sorted(folder.glob("seen-*.jsonl")):
        for line in path.read_text().splitlines():
            said = json.loads(line)
            if "uids" in said:
                name = names[said["seed"]]
                if uids.setdefault(name, said["uids"]) != said["uids"]:
                    raise SystemExit(f"{folder.name}: step {name[0]}, lane {name[1]} saw other samples the second time")
            else:
                metrics[said["step"]] = {
                    key: value for key, value in said["values"].items() if not key.startswith(TIMED)
                }
    return Outcome(tensors, metrics, uids)


def whole(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, put together from its parts."""
    found = {}
    for name, stored in checkpoint.tensors.items():
        found[name] = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
        for part in stored.parts:
            box = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.sizes, strict=True))
            with safe_open(checkpoint.files[part.file], framework="pt") as file:
                found[name][box] = file.get_tensor(part.key)
    return found


def difference(found: Outcome, expected: Outcome, exact: bool) -> float:
    """The largest difference of two tensors or metrics; raises where they differ by more than they may."""
    if found.uids != expected.uids:
        raise SystemExit("the samples are not those of the undisturbed run")
    if found.tensors.keys() != expected.tensors.keys() or found.metrics.keys() != expected.metrics.keys():
        raise SystemExit("tensors or steps are not those of the undisturbed run")
    largest = 0.0
    for name, tensor in found.tensors.items():
        largest = max(largest, float((tensor.double() - expected.tensors[name].double()).abs().max()))
        if exact and not torch.equal(tensor, expected.tensors[name]):
            raise SystemExit(f"{name} differs")
        torch.testing.assert_close(tensor, expected.tensors[name], **CLOSE)
    for step, values in found.metrics.items():
        if exact and values != expected.metrics[step]:
            raise SystemExit(f"metrics of step {step} differ: {values} and {expected.metrics[step]}")
        for name, value in values.items():
            torch.testing.assert_close(value, expected.metrics[step][name], **CLOSE)
    return largest


def prove(out: Path, minutes: float, only: str = "") -> str:
    """Does the cells that are not done yet, while there is time; returns what was shown, in a sentence."""
    out.mkdir(parents=True, exist_ok=True)
    began, base = time.monotonic(), out / "base"
    shutil.rmtree(base, ignore_errors=True)
    job = job_of(base)
    grid = [cell for cell in cells(edges_of(LocalStore(base), job)) if only in cell.name]
    undisturbed: dict[str, Outcome] = {}
    for cell in grid:
        said = out / f"{cell.name}.json"
        if said.exists() or time.monotonic() - began > 60 * minutes:
            continue
        if cell.like not in undisturbed:
            ranks, shard = WORLDS[cell.like]
            undisturbed[cell.like] = run(out / cell.like, base, job, (Attempt(ranks, shard),))
        start = time.monotonic()
        largest = difference(run(out / cell.name, base, job, cell.attempts), undisturbed[cell.like], cell.exact)
        about = {"cell": asdict(cell), "difference": largest, "seconds": time.monotonic() - start}
        said.write_text(json.dumps(about))
        shutil.rmtree(out / cell.name)
        print(f"{cell.name}: {'bitwise equal' if cell.exact else f'within {largest:.1e}'}", flush=True)
    return summary(out, grid)


def summary(out: Path, grid: list[Cell]) -> str:
    """What the cells that are done have shown."""
    done: dict[str, Any] = {
        cell.name: json.loads(path.read_text()) for cell in grid if (path := out / f"{cell.name}.json").exists()
    }
    kinds = Counter(cell.exact for cell in grid if cell.name in done)
    elastic = [done[cell.name]["difference"] for cell in grid if cell.name in done and not cell.exact]
    missing = [cell.name for cell in grid if cell.name not in done]
    return (
        f"{len(done)} of {len(grid)} cells: {kinds[True]} with as many workers after as before, each bitwise equal to "
        f"the undisturbed run (weights, averages, moments, released model, metrics by step, uids); {kinds[False]} with "
        f"3, 2 and 3 workers, uids equal, the largest difference of a number {max(elastic, default=0.0):.1e}."
        + (f" Not run: {', '.join(missing)}." if missing else "")
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for stores and results")
    parser.add_argument("--minutes", type=float, default=60, help="begin no cell after so long")
    parser.add_argument("--only", default="", help="only cells with this in their names")
    arguments = parser.parse_args()
    print(prove(arguments.out, arguments.minutes, arguments.only))
