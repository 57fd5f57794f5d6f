"""Options that several commands share: their names, help and types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

StoreOption = Annotated[str, typer.Option("--store", envvar="UNCLIP_STORE", help="Folder or s3://bucket/prefix.")]
ReleaseOption = Annotated[str, typer.Option("--release", help="champion, NAME@champion, a version, or a folder.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the first picture of each prompt; the next ones count on.")]
NameOption = Annotated[
    str | None, typer.Option("--name", help="Model line; default unclip, or the only one that the store has.")
]
NumberOption = Annotated[int, typer.Option("-n", help="Pictures of each prompt; at most 256 in all.")]
OutOption = Annotated[Path, typer.Option(help="Where the picture grid goes, a PNG file.")]
PictureArgument = Annotated[Path, typer.Argument(metavar="PICTURE", help="A picture file.")]
PromptArgument = Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")]

GRID = Path("grid.png")
"""Where it goes by default."""
