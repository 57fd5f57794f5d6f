"""How two sides are compared: processor seconds in turn, the share of convolutions and products, and peak memory.

Everything runs in one thread. What is timed is the process's processor time, which on a machine of one's own is the
time on the clock, and on a shared one leaves out the waiting for others. Ratios are of neighbours in time, so that a
machine that becomes slower meets both sides.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

MARGIN = 0.03
"""By how much a ratio may exceed 1 before it is called slower: the largest spread between equal sides that was seen."""
SECONDS = 15.0
"""Processor time for the rounds of one comparison, at most; the least number of rounds comes before it."""
MOST = 25
"""Rounds of one comparison."""

Call = Callable[[], Any]


class Compared(NamedTuple):
    """Our best variant against their best."""

    ratio: float
    """Median over the rounds of our time over theirs."""
    low: float
    """Lower quartile of that ratio."""
    high: float
    """Upper quartile."""


def compare(
    what: str, ours: Mapping[str, Call], theirs: Mapping[str, Call], *, least: int = 5, peer: str = "diffusers"
) -> Compared:
    """Times all variants in turn, chooses each side's fastest by its median, and prints one line."""
    calls = {("ours", name): call for name, call in ours.items()} | {("theirs", name): c for name, c in theirs.items()}
    for call in calls.values():
        call()
    took: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    began = time.process_time()
    while len(took["ours", next(iter(ours))]) < MOST:
        rounds = len(took["ours", next(iter(ours))])
        if rounds >= least and time.process_time() - began > SECONDS:
            break
        # Each round another order: nobody is always behind the same neighbour.
        keys = list(calls)
        for key in keys[rounds % len(keys) :] + keys[: rounds % len(keys)]:
            start = time.process_time()
            calls[key]()
            took[key].append(time.process_time() - start)
    medians = {key: statistics.median(times) for key, times in took.items()}
    mine, other = (min((k for k in medians if k[0] == side), key=medians.__getitem__) for side in ("ours", "theirs"))
    ratios = sorted(a / b for a, b in zip(took[mine], took[other], strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    rest = "; ".join(f"{side} {name} {medians[side, name] * 1000:.0f} ms" for side, name in medians)
    print(
        f"\n{what}: {middle:.2f} ({low:.2f} to {high:.2f}, {len(ratios)} rounds) of the time of {peer}, "
        f"{mine[1]} against {other[1]} [{rest}]",
        flush=True,
    )
    return Compared(middle, low, high)


HEAVY = ("convolution", "conv2d", "addmm", "aten::mm", "bmm", "linear", "scaled_dot_product", "flash_attention")
"""Parts of the names of operators that multiply matrices or convolve, forward or backward."""


def heavy_share(call: Call) -> float:
    """Share of the processor time that is spent inside convolutions, matrix products and attention."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    events = found.key_averages()
    heavy = sum(e.self_cpu_time_total for e in events if any(name in e.key.lower() for name in HEAVY))
    return heavy / sum(e.self_cpu_time_total for e in events)


def peak_bytes(call: Call) -> int:
    """Memory that a call takes at its peak beyond what lay there before it (weights), by the kernel's account."""
    call()
    with open("/proc/self/clear_refs", "w") as clear:  # 5: the peak of resident memory begins anew
        clear.write("5")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def peak_in_child(module: str, *arguments: str) -> int:
    """What `python -m module arguments…` prints last: a peak, measured where nothing else has ever lain.

    The allocator gives large blocks back at once there, else what one call left behind would hide the next one's need.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], env=environment, stdout=subprocess.PIPE, check=True, text=True
    )
    return int(done.stdout.split()[-1])


def one_thread() -> None:
    """Both sides alike; the second core of a small machine is somebody else's."""
    torch.set_num_threads(1)


def one_core() -> None:
    """This process and all that it starts stay on one core, where a thread's time cannot depend on what another of them
    does at once on a core that shares its caches."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def status(name: str) -> int:
    """A line of /proc/self/status that counts memory, as VmHWM, in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
