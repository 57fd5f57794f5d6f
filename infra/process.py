"""A name for a running process that outlives it, so that others can tell whether it is dead.

A process is named by its host, process id and start time. Of a process on this very host (same boot, same process
namespace) we can know that it is gone; of any other we cannot, and must wait for its lease to expire.
"""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """Names one process for all time. `host` tells boots and containers of one machine apart."""

    host: str
    pid: int
    started: str

    @classmethod
    def this(cls) -> Process:
        """The process that calls."""
        pid = os.getpid()
        return cls(_host(), pid, _started(pid) or "")

    def dead(self) -> bool:
        """True if it ran on this very host and runs no more. False if it lives, or if we cannot know."""
        return self.host == _host() and _started(self.pid) != self.started


@cache
def _host() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
        namespace = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        return socket.gethostname()
    return f"{socket.gethostname()}-{boot}-{namespace}"


def _started(pid: int) -> str | None:
    """The start time of a process as its system tells it; None if there is none, or only what remains to be reaped."""
    if not Path("/proc/self/stat").exists():
        listed = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return listed.stdout.strip() or None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, start_ticks = fields[0], fields[19]
    return None if state in "ZX" else start_ticks
