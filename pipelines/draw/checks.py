"""What `unclip generate` and every `unclip edit` check before a model is loaded, so that a mistake costs no waiting."""

from __future__ import annotations

import tempfile
from pathlib import Path

from infra.errors import Refused
from unclip.config import FRACTION, PART, SEED, Range

MOST_PICTURES = 256
"""Pictures of one command: more would make a grid that nobody reads, and at 1024 px already take 0.8 GB."""
GUIDANCE = Range(0, 100)
"""Scales beyond are of no use: pictures burn out below 20, and float32 overflows somewhere above."""
SHARES = {"eta": FRACTION, "theta": PART, "strength": PART}
"""What `unclip.manipulate` takes as a share of something."""


def check_order(number: int, *, rows: int = 1, seed: int = 0, out: Path | str) -> None:
    """Raises Refused for pictures (`number` in each of `rows`), a first seed or a place that cannot be."""
    if number < 1 or rows < 1:
        raise Refused(f"there is nothing to draw: {rows} rows of {number} pictures")
    if number * rows > MOST_PICTURES:
        raise Refused(
            f"{number * rows:,} pictures are more than the {MOST_PICTURES} that one command draws; ask for fewer, and "
            "again with another --seed"
        )
    if wanted := SEED.refuses(seed) or SEED.refuses(seed + number - 1):
        raise Refused(f"--seed {seed} cannot be; seeds must be {wanted}")
    check_out(Path(out))


def check_guidance(*, unguided: int = 1, **scales: float | None) -> None:
    """Raises Refused, with its name, for a guidance scale that cannot be; None is the release's own.

    unguided: the scale at which there is no guidance: 1 of classifier-free guidance, 0 of a guide's.
    """
    for name, scale in scales.items():
        if scale is not None and (wanted := GUIDANCE.refuses(scale)):
            raise Refused(f"--{name.replace('_', '-')} is {scale}; it must be {wanted} ({unguided} is unguided)")


def check_share(**shares: float) -> None:
    """Raises Refused, with its name, for a share (of `SHARES`) that cannot be."""
    for name, share in shares.items():
        if wanted := SHARES[name].refuses(share):
            raise Refused(f"--{name} is {share}; it must be {wanted}")


def check_way(steps: int) -> None:
    """Raises Refused for a way from one picture to another that has less than its two ends."""
    if steps < 2:
        raise Refused(f"--steps is {steps}; a way has at least 2 pictures")


def check_out(out: Path) -> None:
    """Raises Refused unless a PNG can be written there; makes the folders that are missing."""
    if out.suffix.lower() != ".png":
        raise Refused(f"--out {out}: picture grids are PNG files; give a name that ends in .png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise Refused(f"--out {out} cannot be written: {error.strerror or error}") from None
