"""Measures where the time of training goes, by parts of a step, on the device's own timeline."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch


class Stopwatch:
    """`lap(part)` says that all since the last lap was that part; `shares` what became of the time.

    A GPU works behind the program, so there a lap is an event in its stream, read when it has long passed: what the
    GPU did, or waited for, between two of them is the part's. Nothing waits for the GPU but `shares`.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._laps: list[tuple[str, Any]] = [("", self._now())]

    def lap(self, part: str) -> None:
        """Ends a lap."""
        if part == self._laps[-1][0]:
            self._laps[-1] = part, self._now()
        else:
            self._laps.append((part, self._now()))

    def shares(self) -> dict[str, float]:
        """The share of each part in the time since the last call, in [0, 1]; they sum to 1. Begins anew."""
        self.lap("rest")
        if self._on_gpu:
            self._laps[-1][1].synchronize()
        spent: dict[str, float] = defaultdict(float)
        for (_, before), (part, after) in zip(self._laps, self._laps[1:], strict=False):
            spent[part] += before.elapsed_time(after) if self._on_gpu else after - before
        self._laps = [("", self._now())]
        total = sum(spent.values())
        return {part: seconds / total for part, seconds in spent.items()} if total else {}

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
