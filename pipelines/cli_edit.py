"""`unclip edit`: pictures from pictures; one command, one function of pipelines.edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.options import (
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


def _draw(kind: str, store: str, release: str, *order: Any) -> None:
    """What all of them do: the function of pipelines.edit of that name, on an opened store."""
    from infra.store import open_store
    from pipelines import edit as editing

    typer.echo(f"wrote {getattr(editing, kind)(open_store(store, create=False), release, *order)}")


@edit.command("vary")
def edit_vary(
    picture: PictureArgument,
    number: NumberOption = 4,
    eta: Annotated[float, typer.Option(help="How far they may go, from 0 (the picture itself) to 1.")] = 1.0,
    seed: SeedOption = 0,
    release: ReleaseOption = "champion",
    out: OutOption = GRID,
    store: StoreOption = "./store",
) -> None:
    """Others of a picture that CLIP sees alike."""
    _draw("vary", store, release, picture, number, eta, seed, out)


@edit.command("interpolate")
def edit_interpolate(
    first: Annotated[str, typer.Argument(help="A picture file, or a prompt.")],
    second: Annotated[str, typer.Argument(help="Another, of the same kind.")],
    steps: Annotated[int, typer.Option(help="Pictures, both ends included.")] = 7,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="One noise for all pictures, not the way between the two's.")
    ] = False,
    seed: SeedOption = 0,
    release: ReleaseOption = "champion",
    out: OutOption = GRID,
    store: StoreOption = "./store",
) -> None:
    """The way from one picture, or prompt, to another."""
    _draw("interpolate", store, release, first, second, steps, fixed, seed, out)


@edit.command("diff")
def edit_diff(
    picture: PictureArgument,
    before: Annotated[str, typer.Argument(help="What the picture shows.")],
    after: Annotated[str, typer.Argument(help="What it should show.")],
    theta: Annotated[
        float, typer.Option(help="Share of the way toward the text, up to 1; the paper: 0.25 to 0.5.")
    ] = 0.375,
    steps: Annotated[int, typer.Option(help="Pictures on the way.")] = 5,
    release: ReleaseOption = "champion",
    out: OutOption = GRID,
    store: StoreOption = "./store",
) -> None:
    """A picture led from one description to another (text diff)."""
    _draw("diff", store, release, picture, before, after, theta, steps, out)


@edit.command("redraw")
def edit_redraw(
    picture: PictureArgument,
    prompt: PromptArgument,
    strength: Annotated[float, typer.Option(help="Share of the steps done again: near 0 little changes, 1 all.")] = 0.6,
    number: NumberOption = 4,
    seed: SeedOption = 0,
    release: ReleaseOption = "champion",
    out: OutOption = GRID,
    store: StoreOption = "./store",
) -> None:
    """A picture drawn over under a prompt (SDEdit)."""
    _draw("redraw", store, release, picture, prompt, strength, number, seed, out)


@edit.command("inpaint")
def edit_inpaint(
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
    seed: SeedOption = 0,
    release: ReleaseOption = "champion",
    out: OutOption = GRID,
    store: StoreOption = "./store",
) -> None:
    """A part of a picture drawn anew; the rest stays."""
    _draw("inpaint", store, release, picture, mask, prompt, number, seed, out, trained)


@edit.command("probe")
def edit_probe(
    picture: PictureArgument,
    keep: Annotated[
        list[int] | None,
        typer.Option(help="Directions to keep, a picture each (say it again for more); default doubling numbers."),
    ] = None,
    seed: SeedOption = 0,
    release: ReleaseOption = "champion",
    out: OutOption = GRID,
    store: StoreOption = "./store",
) -> None:
    """What CLIP sees in a picture, direction by direction of the data's PCA."""
    _draw("probe", store, release, picture, keep or (), seed, out)
