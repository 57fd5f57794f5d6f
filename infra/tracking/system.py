"""Figures of the machine and this process: CPU, memory, disk, network and GPUs, under MLflow's names.

Read from /proc and nvidia-smi, so that a trainer needs neither MLflow nor another package; where there is none of them
(another system, no GPU) their figures are missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

PROC = Path("/proc")
_PATIENCE_S = 10
_GPU = ("index", "utilization.gpu", "memory.used", "memory.total", "power.draw", "power.limit")


class SystemMetrics:
    """Takes figures every `seconds` in a thread (0: never), until `close`; `new` gives what came since it was asked.

    gpus: whether to ask for those that this process may see.
    """

    def __init__(self, seconds: float, *, gpus: bool = False) -> None:
        self._seconds, self._gpus = seconds, gpus
        self._latest: dict[str, float] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        if seconds:
            threading.Thread(target=self._watch, name="vitals", daemon=True).start()

    def new(self) -> dict[str, float]:
        """The latest figures by name ("cpu_utilization_percentage"); {} where none were taken since the last call."""
        with self._lock:
            found, self._latest = self._latest, {}
        return found

    def close(self) -> None:
        """Takes no more; waits for nothing."""
        self._closed.set()

    def _watch(self) -> None:
        before = Counters.now()
        while not self._closed.wait(self._seconds):
            after = Counters.now()
            found = after.since(before) | machine() | (gpus() if self._gpus else {})
            before = after
            with self._lock:
                self._latest = found


class Counters:
    """What only grows: times of CPUs and of this process, bytes of the network, at one moment."""

    def __init__(self, at: float, busy: float, total: float, own: float, received: int, sent: int) -> None:
        self.at, self.busy, self.total, self.own, self.received, self.sent = at, busy, total, own, received, sent

    @classmethod
    def now(cls, proc: Path = PROC) -> Counters:
        """Of this machine and process."""
        busy = total = 0.0
        received = sent = 0
        if (proc / "stat").exists():
            ticks = [float(part) for part in (proc / "stat").read_text().partition("\n")[0].split()[1:9]]
            total, busy = sum(ticks), sum(ticks) - ticks[3] - ticks[4]  # all but idle and waiting for a disk
        if (proc / "net" / "dev").exists():
            for line in (proc / "net" / "dev").read_text().splitlines()[2:]:
                name, _, counts = line.partition(":")
                if name.strip() != "lo":
                    numbers = [int(part) for part in counts.split()]
                    received, sent = received + numbers[0], sent + numbers[8]
        return cls(time.monotonic(), busy, total, time.process_time(), received, sent)

    def since(self, before: Counters) -> dict[str, float]:
        """Shares of the time between (a process's 100 is one CPU), and megabytes in it."""
        found = {
            "process_cpu_percentage": 100 * (self.own - before.own) / max(self.at - before.at, 1e-9),
            "network_receive_megabytes": (self.received - before.received) / 1e6,
            "network_transmit_megabytes": (self.sent - before.sent) / 1e6,
        }
        if self.total > before.total:
            found["cpu_utilization_percentage"] = 100 * (self.busy - before.busy) / (self.total - before.total)
        return found


def machine(proc: Path = PROC) -> dict[str, float]:
    """Memory and disk as they are now."""
    disk = shutil.disk_usage(os.sep)
    found = {
        "disk_usage_percentage": 100 * disk.used / disk.total,
        "disk_usage_megabytes": disk.used / 1e6,
        "disk_available_megabytes": disk.free / 1e6,
    }
    if (proc / "meminfo").exists():
        pairs = (line.split() for line in (proc / "meminfo").read_text().splitlines())
        kilobytes = {name.rstrip(":"): int(count) for name, count, *_ in pairs}
        total, used = kilobytes["MemTotal"], kilobytes["MemTotal"] - kilobytes["MemAvailable"]
        found |= {
            "system_memory_usage_megabytes": used * 1024 / 1e6,
            "system_memory_usage_percentage": 100 * used / total,
            "process_memory_megabytes": int((proc / "self" / "statm").read_text().split()[1]) * _PAGE / 1e6,
        }
    return found


def gpus() -> dict[str, float]:
    """Use, memory and power of the GPUs that CUDA_VISIBLE_DEVICES names (all, where it is not set); {} without any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU)}", "--format=csv,noheader,nounits"]
    command += ["-i", visible] if visible else []
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return read_gpus(told)


def read_gpus(told: str) -> dict[str, float]:
    """nvidia-smi's lines, one a GPU; a figure that a GPU does not tell ("[N/A]") is left out."""
    found: dict[str, float] = {}
    for line in told.splitlines():
        values = dict(zip(_GPU, (_number(part) for part in line.split(",")), strict=True))
        used, total, watts, limit = (values[name] for name in _GPU[2:])
        figures = {
            "utilization_percentage": values["utilization.gpu"],
            "memory_usage_megabytes": used and used * 2**20 / 1e6,
            "memory_usage_percentage": 100 * used / total if used is not None and total else None,
            "power_usage_watts": watts,
            "power_usage_percentage": 100 * watts / limit if watts is not None and limit else None,
        }
        number = int(values["index"] or 0)
        found |= {f"gpu_{number}_{name}": value for name, value in figures.items() if value is not None}
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


_PAGE = os.sysconf("SC_PAGE_SIZE")
