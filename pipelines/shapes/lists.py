"""Writes what the pipeline is given: the world's URL list as Parquet, and held-out prompts as JSON lines.

Both have the same bytes whenever they are written with the same arguments (and, for Parquet, the same pyarrow). A
longer list begins with the rows of a shorter one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from infra.errors import Refused
from pipelines.shapes.links import Link, percent_of
from pipelines.shapes.world import prompts

if TYPE_CHECKING:
    import pyarrow as pa


LABELS = ("shape", "colour", "size", "background")


def training_list(rows: int, seed: int, faults: bool = True, pairs: float = 0.3, *, labels: bool = False) -> pa.Table:
    """The list of `rows` links: columns url, caption, source (the link's host), all strings.

    `pairs` is the share of pictures with two objects, a whole percentage. Without `faults` every link works at once,
    every caption is true and no picture comes twice. `labels` adds the columns shape, colour, size (all three null of
    a picture with two objects) and background, which tell what the picture shows, whatever its caption says.
    """
    import pyarrow as pa

    if rows < 1:
        raise Refused(f"A list has at least one row, not {rows}.")
    links = [Link(seed, percent_of(pairs), index, faults) for index in range(rows)]
    columns = {
        "url": [link.url for link in links],
        "caption": [link.caption for link in links],
        "source": [link.host for link in links],
    }
    if labels:
        seen = [link.scene.attributes for link in links]
        columns |= {name: pa.array([scene.get(name) for scene in seen], pa.string()) for name in LABELS}
    return pa.table(columns)


def write_list(
    path: Path | str, rows: int, seed: int, pairs: float = 0.3, faults: bool = True, *, labels: bool = False
) -> None:
    """Write `training_list` to a Parquet file."""
    import pyarrow.parquet as pq

    pq.write_table(training_list(rows, seed, faults, pairs, labels=labels), path, compression="zstd")


def write_prompts(path: Path | str, singles: int, pairs: int, seed: int) -> None:
    """Write held-out prompts, singles first, one JSON object a line: {"prompt", "kind", "expected"}."""
    drawn = [*prompts("single", singles, seed), *prompts("pair", pairs, seed)]
    Path(path).write_text("".join(json.dumps(one, sort_keys=True) + "\n" for one in drawn), encoding="utf-8")
