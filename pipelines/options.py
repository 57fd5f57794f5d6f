"""Options that several commands share: their names, help and types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

StoreOption = Annotated[str, typer.Option("--store", envvar="UNCLIP_STORE", help="Folder or s3://bucket/prefix.")]
ReleaseOption = Annotated[str, typer.Option("--release", help="NAME@champion, a version, or a folder.")]
SeedOption = Annotated[int, typer.Option(help="The first picture's seed.")]
OutOption = Annotated[Path, typer.Option(help="Where the picture grid goes.")]
PictureArgument = Annotated[Path, typer.Argument(metavar="PICTURE", help="A picture file.")]
