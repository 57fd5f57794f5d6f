"""The paper's findings on the shapes world: each trained and drawn side by side, measured, and written down as a row.

    python -m tests.proofs.findings --store DIR --out DIR [--docs docs] [--minutes 60]

DIR is a store in which `unclip run demo` has made a release; it is copied to OUT/store and only read. Its CLIP,
embeddings, selections and statistics are used, its models are one side of most comparisons, and what is trained beside
them is added to the copy. A fit that has a record is not trained again, and a cell that has a line in OUT/cells.jsonl
is not drawn again: a second call goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from tests.proofs.findings_cells import DEMO, SINGLES, AnyCell, Bits, Cell, Cost, Enlarged, Words
from tests.proofs.findings_draw import Bench
from tests.proofs.findings_fits import VARIANTS, fitted

STORE = "store"
"""The copy of the demo's store, in the folder of the cells."""
FEW_STEPS = (4, 8, 16, 25)
BOUND_STEPS = (25, 100)
SCALES = (1.0, 2.0, 4.0, 6.0)
FED_SCALES = (1.0, 2.0, 4.0)
PAIRS, TRIPLES = 240, 120
LEARNED = ("learned_range", "fixed_small", "fixed_large")
FIXED = LEARNED[1:]
GUIDED: dict[str, dict[str, Any]] = {
    "z_i and caption": {},
    "z_i alone": {"caption": False},
    "caption, z_i given": {"against": "image"},
    "caption alone": {"embedding": "none"},
    "caption alone, trained so": {"embedding": "none", "decoder": "decoder-caption"},
}
"""Ways to guide the decoder: what it is given and led away from."""
FED: dict[str, dict[str, Any]] = {
    "z_i of the prior": {},
    "z_t, as it is": {"embedding": "text"},
    "z_t, as long as a z_i": {"embedding": "text-length"},
    "z_t, standardised as z_i": {"embedding": "text-moved"},
    "caption alone": {"embedding": "none"},
    "z_t, decoder trained on z_t": {"embedding": "text", "decoder": "decoder-text"},
    "caption alone, decoder trained so": {"embedding": "none", "decoder": "decoder-caption"},
    "true z_i": {"embedding": "true"},
}
"""What the decoder may be fed."""
ZERO_SHOT = ("z_t, as it is", "z_t, as long as a z_i", "z_t, standardised as z_i")
"""Ways to feed a z_t to a decoder that was trained on z_i; the paper does not say how it scales it."""
ALONE: dict[str, dict[str, Any]] = {name: FED[name] | {"caption": False} for name in ZERO_SHOT}
"""The same without the caption: where that is there too, it may be all that is needed."""
PRIORS = (DEMO, "ar-prior", "prior-long", "ar-prior-long")
UPSAMPLERS = (DEMO, "upsampler-plain", "upsampler-again", "upsampler-plain-again")
CONDITIONS = ("drawn", "clean", "blurred")


def ancestral(decoder: str, variance: str, steps: int) -> Cell:
    """A cell of the comparison of variances: DDPM, unguided."""
    return Cell(decoder=decoder, sampler="ddpm", variance=variance, steps=steps, guidance=1.0)


def tasks() -> Iterator[str | AnyCell]:
    """Everything that is trained (by name) and drawn; what several findings need is named more than once.

    In the order of their worth, should the time not suffice: the trainings at the end repeat or lengthen others.
    """
    yield from ("decoder-learned", "decoder-caption", "ar-prior", "upsampler-plain", Words())
    for fed in FED.values():
        yield from (Cell(**fed), Cell(**fed, scenes="pair", count=PAIRS))
    yield from (Cell(**alone) for alone in ALONE.values())
    for prior in PRIORS:
        yield from (Cell(embedding=prior), Cell(embedding=prior, scenes="pair", count=PAIRS), Cost(prior))
    yield from (Enlarged(upsampler, condition) for condition in CONDITIONS for upsampler in UPSAMPLERS)
    for embedding, decoder in ((DEMO, DEMO), ("none", "decoder-caption"), ("true", DEMO)):
        yield Cell("triple", decoder, embedding, count=TRIPLES)
    for scale in FED_SCALES:
        yield from (Cell(**how, guidance=scale) for how in GUIDED.values())
    for steps in FEW_STEPS:
        yield from (ancestral("decoder-learned", variance, steps) for variance in LEARNED)
        yield from (ancestral(DEMO, variance, steps) for variance in FIXED)
    for scale in FED_SCALES:
        yield from (Cell(**fed, guidance=scale) for fed in FED.values())
    for steps in BOUND_STEPS:
        yield from (Bits("decoder-learned", variance, steps) for variance in LEARNED)
        yield from (Bits(DEMO, variance, steps) for variance in FIXED)
    for scale in SCALES:
        yield from (Cell(**how, guidance=scale) for how in GUIDED.values())
    yield from (Cell(embedding=prior, prior_guidance=2.0) for prior in PRIORS)
    yield from VARIANTS


def needs(cell: AnyCell) -> set[str]:
    """The variants that a cell draws with."""
    return {value for value in vars(cell).values() if isinstance(value, str) and value in VARIANTS}


def called(task: str | AnyCell) -> str:
    """The name of a task's line."""
    return f"fit {task}" if isinstance(task, str) else task.name


def lines(out: Path) -> dict[str, dict[str, Any]]:
    """What is drawn: name → line; one that was cut off counts as not there."""
    found, path = {}, out / "cells.jsonl"
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        found[line["name"]] = line
    return found


_bench: Bench


def _open(store: Path, release: str, out: Path) -> None:
    global _bench
    import torch

    from infra.store.local import LocalStore

    torch.set_num_threads(1)
    local = LocalStore(store)
    local.check(create=False)
    _bench = Bench(local, release, out)


def _fit(name: str) -> dict[str, Any]:
    started = time.perf_counter()
    fitted(_bench.store, _bench.folder, name)
    return {"name": called(name), "seconds": round(time.perf_counter() - started, 1)}


def _draw(cell: AnyCell) -> dict[str, Any]:
    return _bench.run(cell)


def _truth(scenes: str, count: int, seed: int) -> None:
    _bench.truth(scenes, count, seed)


def work(arguments: argparse.Namespace) -> None:
    """Trains and draws what is missing, a process a task, until the time is over."""
    end = time.monotonic() + 60 * arguments.minutes
    done = set(lines(arguments.out))
    waiting = [task for task in dict.fromkeys(tasks()) if called(task) not in done]
    trained = {name for name in VARIANTS if called(name) in done}
    running: dict[Any, Any] = {}
    spawn = multiprocessing.get_context("spawn")
    places = (arguments.out / STORE, arguments.release, arguments.out)
    with ProcessPoolExecutor(arguments.workers, spawn, _open, places) as pool:
        for scenes, count in (("single", SINGLES), ("pair", PAIRS), ("triple", TRIPLES)):
            wait([pool.submit(_truth, scenes, count, seed) for seed in range(3)])
        while waiting or running:
            ready = (task for task in waiting if isinstance(task, str) or needs(task) <= trained)
            task = next(ready, None) if len(running) < arguments.workers and time.monotonic() < end else None
            if task is not None:
                waiting.remove(task)
                running[pool.submit(*((_fit, task) if isinstance(task, str) else (_draw, task)))] = task
                continue
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, line = running.pop(future), future.result()
                if isinstance(task, str):
                    trained.add(task)
                with open(arguments.out / "cells.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{time.strftime('%H:%M:%S')} {line['name']}: {line['seconds']:.0f} s", flush=True)


def missing(out: Path) -> list[str]:
    """Names of what is not trained or not drawn yet."""
    done = lines(out)
    return [called(task) for task in dict.fromkeys(tasks()) if called(task) not in done]


def main() -> None:
    """Trains and draws what is missing, then writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a folder with a release of the recipe demo")
    parser.add_argument("--release", default="champion")
    parser.add_argument("--out", type=Path, required=True, help="a folder for what is drawn")
    parser.add_argument("--docs", type=Path, help="a folder for findings.md and its pictures; default OUT")
    parser.add_argument("--minutes", type=float, default=60, help="nothing is begun after this time")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not (arguments.out / STORE).exists():
        whole = shutil.copytree(arguments.store, arguments.out / f"{STORE}.part", dirs_exist_ok=True)
        whole.rename(arguments.out / STORE)
    os.environ["OMP_NUM_THREADS"] = "1"
    work(arguments)
    from tests.proofs.findings_page import write_page

    write_page(arguments.out, arguments.docs or arguments.out)
    if left := missing(arguments.out):
        raise SystemExit(f"{len(left)} trainings and cells are not done yet: the same command goes on from here")


if __name__ == "__main__":
    main()
