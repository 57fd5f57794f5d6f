"""`unclip edit`: pictures from pictures; one command, one function of pipelines.draw.edit.

A command here says its own arguments and options alone, and has no body: `_command` adds what all of them have, and
hands all of it, by name, to the function of pipelines.draw.edit of the command's name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli.options import (
    GRID,
    NumberOption,
    OutOption,
    PictureArgument,
    PromptArgument,
    ReleaseOption,
    SeedOption,
    StoreOption,
)

edit = typer.Typer(
    no_args_is_help=True, help="Pictures from pictures: vary, interpolate, diff, redraw, inpaint, probe."
)


def _seeded(seed: SeedOption = 0) -> None: ...


def _stored(release: ReleaseOption = "champion", out: OutOption = GRID, store: StoreOption = "./store") -> None: ...


def _command(*shared: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function's arguments and docstring, with the options of `shared` behind its own."""

    def made(own: Callable[..., None]) -> Callable[..., None]:
        def do(store: str, **order: Any) -> None:
            from infra.store import open_store
            from pipelines.draw import edit as editing

            typer.echo(f"wrote {getattr(editing, own.__name__)(open_store(store, create=False), **order)}")

        said = [inspect.signature(one, eval_str=True).parameters.values() for one in (own, *shared)]
        do.__signature__ = inspect.Signature([one for some in said for one in some])  # type: ignore[attr-defined]
        return edit.command(own.__name__, help=inspect.getdoc(own))(do)

    return made


@_command(_seeded, _stored)
def vary(
    picture: PictureArgument,
    number: NumberOption = 4,
    eta: Annotated[float, typer.Option(help="How far they may go, from 0 (the picture itself) to 1.")] = 1.0,
) -> None:
    """Others of a picture that CLIP sees alike."""


@_command(_seeded, _stored)
def interpolate(
    first: Annotated[str, typer.Argument(help="A picture file, or a prompt.")],
    second: Annotated[str, typer.Argument(help="Another, of the same kind.")],
    steps: Annotated[int, typer.Option(help="Pictures, both ends included.")] = 7,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="One noise for all pictures, not the way between the two's.")
    ] = False,
) -> None:
    """The way from one picture, or prompt, to another."""


@_command(_stored)
def diff(
    picture: PictureArgument,
    before: Annotated[str, typer.Argument(help="What the picture shows.")],
    after: Annotated[str, typer.Argument(help="What it should show.")],
    theta: Annotated[
        float, typer.Option(help="Share of the way toward the text, up to 1; the paper: 0.25 to 0.5.")
    ] = 0.375,
    steps: Annotated[int, typer.Option(help="Pictures on the way.")] = 5,
) -> None:
    """A picture led from one description to another (text diff)."""


@_command(_seeded, _stored)
def redraw(
    picture: PictureArgument,
    prompt: PromptArgument,
    strength: Annotated[float, typer.Option(help="Share of the steps done again: near 0 little changes, 1 all.")] = 0.6,
    number: NumberOption = 4,
) -> None:
    """A picture drawn over under a prompt (SDEdit)."""


@_command(_seeded, _stored)
def inpaint(
    picture: PictureArgument,
    mask: Annotated[Path, typer.Argument(help="A picture as large: white (or transparent) is drawn anew.")],
    prompt: PromptArgument,
    number: NumberOption = 4,
    trained: Annotated[
        bool | None,
        typer.Option(
            "--trained/--zero-shot",
            help="By the release's inpainter, or by its decoder; default the inpainter where there is one.",
        ),
    ] = None,
) -> None:
    """A part of a picture drawn anew; the rest stays."""


@_command(_seeded, _stored)
def probe(
    picture: PictureArgument,
    keep: Annotated[
        list[int] | None,
        typer.Option(help="Directions to keep, a picture each (say it again for more); default doubling numbers."),
    ] = None,
) -> None:
    """What CLIP sees in a picture, direction by direction of the data's PCA."""
