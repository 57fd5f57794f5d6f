"""Trainers in parallel, one thread each, against one after another with two threads each: wall time of the training.

    python -m tests.proofs.parallel --store DIR [--repeats 3]

The tiny recipe's data is made once; each repeat trains the prior, the decoder and the upsamplers on a copy of it, once
either way. The time is taken from MLflow: from the first trainer's start to the last one's end.
"""

from __future__ import annotations

import argparse
import shutil
import sqlite3
import statistics
from pathlib import Path

from tests.proofs.kill import finish

TRAINERS = ("decoder", "prior", "upsamplers.32", "upsamplers.64")
TOGETHER = [option for name in TRAINERS for option in ("--set", f"{name}.cpus=0.5", "--set", f"{name}.threads=1")]
ALONE = [option for name in TRAINERS for option in ("--set", f"{name}.cpus=2", "--set", f"{name}.threads=2")]


def spans(store: Path) -> dict[str, tuple[float, float]]:
    """Trainer → (start, end) in seconds, as MLflow has them."""
    with sqlite3.connect(store / "mlflow" / "mlflow.db") as database:
        rows = database.execute("select name, start_time, end_time from runs where end_time is not null").fetchall()
    names = ("decoder", "prior", "upsampler-")
    return {name: (start / 1000, end / 1000) for name, start, end in rows if name.startswith(names)}


def runs(store: Path) -> list[str]:
    """Names of every run in MLflow, children included."""
    with sqlite3.connect(store / "mlflow" / "mlflow.db") as database:
        return [name for (name,) in database.execute("select name from runs")]


def last_losses(store: Path, stage: str) -> int:
    """How often a stage's loss at its last step was reported: as often as it was trained to the end."""
    query = (
        "select count(*) from metrics m join runs r using (run_uuid) where r.name = ? and m.key = 'loss' and m.step = "
        "(select max(step) from metrics n where n.run_uuid = m.run_uuid and n.key = 'loss')"
    )
    with sqlite3.connect(store / "mlflow" / "mlflow.db") as database:
        return database.execute(query, (stage,)).fetchone()[0]


def killed(store: Path) -> list[str]:
    """Names of the runs in MLflow that were stopped, sorted."""
    with sqlite3.connect(store / "mlflow" / "mlflow.db") as database:
        return [name for (name,) in database.execute("select name from runs where status = 'KILLED' order by name")]


def training(prepared: Path, store: Path, options: list[str]) -> float:
    """Seconds from the first trainer's start to the last one's end, on a copy of the prepared store."""
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(prepared, store)
    finish(store, "--until", "bundle", *options)
    found = spans(store)
    assert len(found) == 4, found
    return max(end for _, end in found.values()) - min(start for start, _ in found.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a folder for the stores; emptied first")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    shutil.rmtree(arguments.store, ignore_errors=True)
    arguments.store.mkdir(parents=True)
    finish(arguments.store / "prepared", "--until", "statistics")
    together, alone = [], []
    for repeat in range(arguments.repeats):
        together.append(training(arguments.store / "prepared", arguments.store / "together", TOGETHER))
        alone.append(training(arguments.store / "prepared", arguments.store / "alone", ALONE))
        print(f"repeat {repeat}: together {together[-1]:.1f} s, one after another {alone[-1]:.1f} s", flush=True)
    ratio = statistics.median(a / b for a, b in zip(together, alone, strict=True))
    print(f"together takes {ratio:.2f} of the time of one after another (median of {arguments.repeats})")
    if ratio >= 1:
        raise SystemExit("training in parallel was not faster")
