"""The cells of the findings: each names one setting, and says nothing of how it is drawn."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SINGLES = 256
"""Prompts of one object: the 32 held-out combinations, eight times each."""
DEMO = "demo"
"""The release's own model, among the names of variants."""


@dataclass(frozen=True)
class Cell:
    """Pictures drawn by a decoder."""

    scenes: str = "single"
    """single, pair or triple."""
    decoder: str = DEMO
    embedding: str = DEMO
    """What stands for z_i: a prior's name; `text`, `text-length` (z_t as long as a z_i is) or `text-moved` (z_t with
    the mean and deviations of z_i); `true` (of a true picture); `none` (dropped)."""
    caption: bool = True
    against: str = "nothing"
    """What guidance leads away from: `nothing` (neither z_i nor caption) or `image` (z_i without the caption)."""
    guidance: float = 2.0
    prior_guidance: float = 1.0
    sampler: str = "dpm_solver_pp"
    steps: int = 12
    variance: str | None = None
    count: int = SINGLES

    @property
    def name(self) -> str:
        """As its line and its file are called: what differs from the default."""
        return _name(self, Cell())


@dataclass(frozen=True)
class Enlarged:
    """Pictures drawn by the first upsampler."""

    upsampler: str = DEMO
    condition: str = "drawn"
    """The low-resolution pictures: `drawn` by the demo's decoder, `clean` (true ones made small) or `blurred`."""
    count: int = SINGLES

    @property
    def name(self) -> str:
        """As its line and its file are called."""
        return "enlarged-" + _name(self, Enlarged())


@dataclass(frozen=True)
class Bits:
    """The variational bound of a decoder on true pictures, in bits per dimension."""

    decoder: str
    variance: str
    steps: int

    @property
    def name(self) -> str:
        """As its line is called."""
        return f"bits-{self.decoder}-{self.variance}-{self.steps}"


@dataclass(frozen=True)
class Words:
    """Does CLIP prefer a pair's caption to one with something exchanged, given the true picture?"""

    count: int = 240
    name: str = "words"


@dataclass(frozen=True)
class Cost:
    """What a prior's training and one z_i of it cost, in floating-point operations."""

    prior: str

    @property
    def name(self) -> str:
        """As its line is called."""
        return f"cost-{self.prior}"


AnyCell = Cell | Enlarged | Bits | Words | Cost


def _name(cell: Any, usual: Any) -> str:
    given = {key: value for key, value in asdict(cell).items() if value != getattr(usual, key)}
    return ",".join(f"{key}={value}" for key, value in given.items()) or "usual"
