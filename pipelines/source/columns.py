"""What the columns of a list are called: by the recipe, or by the layout of a public data set that it names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from infra.errors import Refused
from infra.records import INDEX
from unclip.config import LATER


@dataclass(frozen=True)
class Columns:
    """What the columns of the list are called."""

    url: str = "url"
    """Column of the picture's address."""
    caption: str = "caption"
    """Column of the text that belongs to it."""
    keep: tuple[str, ...] = ()
    """Further columns to carry along into every index."""
    header: tuple[str, ...] = field(default=(), metadata=LATER)
    """Names of all columns, in order, of CSV and TSV files that begin without a line that names them. A file that has
    that very line all the same is read as well."""

    def __post_init__(self) -> None:
        taken = sorted({*INDEX.names} & {*self.keep})
        if taken:
            raise Refused(f"source.columns.keep names {', '.join(taken)}, unclip's own columns; leave out or rename")
        named = [self.url, self.caption, *self.keep]
        if not all(named):
            raise Refused("source.columns names a column without a name: write what the list calls it")
        if len({*named}) != len(named):
            raise Refused(f"source.columns names a column twice: {', '.join(named)}")
        if not all(self.header) or len({*self.header}) != len(self.header):
            raise Refused("source.columns.header must name each column once")


LAYOUTS = {
    # LAION-2B-en and its subsets with safety and watermark scores, as Re-LAION is published today
    # (huggingface.co/datasets/laion/relaion2B-en-research; img2dataset, dataset_examples/laion5B.md, laion-art.md).
    # laion-art and laion-aesthetic also have `aesthetic`; LAION-400M has no scores but `similarity` and `NSFW`.
    "laion": Columns("URL", "TEXT", ("similarity", "punsafe", "pwatermark")),
    # COYO-700M: github.com/kakaobrain/coyo-dataset, README, "Attributes". Its width and height are measured anew.
    "coyo": Columns(
        "url",
        "text",
        (
            "clip_similarity_vitb32",
            "clip_similarity_vitl14",
            "nsfw_score_opennsfw2",
            "nsfw_score_gantman",
            "watermark_score",
            "aesthetic_score_laion_v2",
        ),
    ),
    # Conceptual 12M: github.com/google-research-datasets/conceptual-12m, README, "Format (.tsv)": two columns and no
    # header line. img2dataset's dataset_examples/cc12m.md puts this very line before it.
    "cc12m": Columns("url", "caption", header=("url", "caption")),
    # DataComp's CommonPool and DataComp-1B: huggingface.co/datasets/mlfoundations/datacomp_1b; download_upstream.py of
    # github.com/mlfoundations/datacomp reads `url` and `text`, its baselines the two scores.
    "datacomp": Columns("url", "text", ("clip_b32_similarity_score", "clip_l14_similarity_score")),
    # A folder with metadata.csv, .jsonl or .parquet as Hugging Face's ImageFolder writes it
    # (huggingface.co/docs/datasets/image_dataset, "Image captioning"): file_name and text.
    "imagefolder": Columns("url", "text"),
}


def columns_of(layout: str | None, said: Mapping[str, Any]) -> Columns:
    """The layout's columns (None: unclip's own defaults) with what was `said` in their place; Refused if unknown."""
    if layout is not None and layout not in LAYOUTS:
        raise Refused(f"source.layout is {layout!r}; known layouts: {', '.join(LAYOUTS)}")
    return dataclasses.replace(Columns() if layout is None else LAYOUTS[layout], **said)
