"""kill -9 of the driver at random moments, rerun each time: the end is byte-identical to an undisturbed run.

    python -m tests.proofs.kill --store DIR [--kills 10] [--seed 0]

Each run of the tiny recipe is killed at a moment drawn uniformly from the length of the undisturbed run; a run that
ends before its moment is compared as well, and the next kill begins a new store. Fits save one checkpoint behind the
other, so that one killed in its midst goes on from there. What is compared: every record of the data and of the models,
byte for byte.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

FITS = ("clip", "prior", "decoder", "upsamplers.32", "upsamplers.64")
OFTEN = [word for fit in FITS for word in ("--set", f"{fit}.checkpoint_seconds=0")]
"""One checkpoint behind the other, so that a killed fit goes on from its middle; in no key, and changes no byte."""
STAGES = (
    "source", "download", "filter-look", "filter", "clip", "embed", "curate-look", "curate", "statistics",
    "prior", "decoder", "upsampler-", "bundle",
)  # fmt: skip


def start(store: Path, *options: str) -> subprocess.Popen[bytes]:
    """`unclip run tiny` in a process group of its own, its output in a file beside the store."""
    command = [sys.executable, "-m", "pipelines.cli", "run", "tiny", "--store", str(store), *OFTEN, *options]
    with store.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def finish(store: Path, *options: str) -> None:
    """Runs to the end; raises with the end of its output if it does not exit with 0."""
    code = start(store, *options).wait()
    if code:
        raise SystemExit(f"run on {store} exited with {code}:\n{store.with_suffix('.log').read_text()[-3000:]}")


def records(store: Path) -> dict[str, bytes]:
    """Every record of the data and the models: name → bytes."""
    folders = [folder for folder in (store / "records").iterdir() if folder.name.startswith(STAGES)]
    return {str(path.relative_to(store)): path.read_bytes() for folder in folders for path in folder.rglob("*.json")}


def compare(expected: dict[str, bytes], found: dict[str, bytes]) -> None:
    """Raises where they differ, naming the first records that do; stages that were not run are not compared."""
    ran = {name.split("/")[1] for name in found}
    expected = {name: record for name, record in expected.items() if name.split("/")[1] in ran}
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if different:
        raise SystemExit(f"{len(different)} records differ from the undisturbed run: {different[:5]}")


def prove(folder: Path, kills: int, seed: int, *options: str) -> str:
    """Makes the undisturbed run, then kills `kills` times in all; returns what was shown, in a sentence."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    finish(folder / "undisturbed", *options)
    return disturb(folder, kills, seed, records(folder / "undisturbed"), time.monotonic() - began, *options)


def disturb(folder: Path, kills: int, seed: int, expected: dict[str, bytes], length: float, *options: str) -> str:
    """Kills runs of `length` seconds at random moments and compares at every end with the records expected."""
    moments, killed, ended, store = random.Random(seed), 0, 0, folder / "killed-0"
    while killed < kills:
        process, moment = start(store, *options), moments.uniform(1, length)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            done = len(records(store)) if (store / "records").is_dir() else 0
            print(f"kill {killed} after {moment:5.1f} s: {done} of {len(expected)} records there", flush=True)
            continue
        ended += 1
        compare(expected, records(store))
        store = folder / f"killed-{ended}"
    finish(store, *options)
    compare(expected, records(store))
    return (
        f"{killed} kills at random moments of a run of {length:.0f} s (seed {seed}), {ended + 1} stores run to their "
        f"end: each of {len(expected)} records of data and models is byte-identical to the undisturbed run's."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a folder for the stores; emptied first")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(prove(arguments.store, arguments.kills, arguments.seed))
