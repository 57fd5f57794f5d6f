"""`unclip releases`: what a person does with released models by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli.options import NameOption, StoreOption
from pipelines.cli.terminal import opened, say, show

releases = typer.Typer(
    no_args_is_help=True, help="Released models: list, show, promote, roll back, verify, export, import."
)


@releases.command("list")
def releases_list(name: NameOption = None, store: StoreOption = "./store") -> None:
    """Every promotion and rollback of a model line, oldest first."""
    from pipelines.promote import ledger as release

    with opened(store) as found:
        show(release.table(found, _line(found, name)))


@releases.command("show")
def releases_show(
    ref: Annotated[str, typer.Argument(help="champion, NAME@champion or a version.")] = "champion",
    store: StoreOption = "./store",
) -> None:
    """What a release consists of, its data and its scores, as JSON."""
    from pipelines.promote import ledger as release

    with opened(store) as found:
        say(json.dumps(release.show(found, ref), indent=1, ensure_ascii=False))


@releases.command("promote")
def releases_promote(
    version: Annotated[str, typer.Argument(help="Version of a bundle.")],
    name: NameOption = None,
    reason: Annotated[str, typer.Option(help="Goes into the ledger.")] = "promoted by hand",
    store: StoreOption = "./store",
) -> None:
    """Makes a release the champion."""
    from pipelines.promote import ledger as release

    with opened(store) as found:
        say(release.promote(found, _line(found, name), version, reason))


@releases.command("rollback")
def releases_rollback(
    name: NameOption = None,
    reason: Annotated[str, typer.Option(help="Goes into the ledger.")] = "rolled back by hand",
    store: StoreOption = "./store",
) -> None:
    """Makes the champion before this one the champion again."""
    from pipelines.promote import ledger as release

    with opened(store) as found:
        say(release.rollback(found, _line(found, name), reason))


@releases.command("verify")
def releases_verify(name: NameOption = None, store: StoreOption = "./store") -> None:
    """Recomputes the ledger's chain and every digest of its releases."""
    from pipelines.promote import ledger as release

    with opened(store) as found:
        say(release.verify(found, _line(found, name)))


@releases.command("export")
def releases_export(
    ref: Annotated[str, typer.Argument(metavar="RELEASE", help="champion, NAME@champion, a version, or a folder.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    form: Annotated[str, typer.Option("--format", help="diffusers")] = "diffusers",
    store: StoreOption = "./store",
) -> None:
    """Writes a release as a folder that diffusers' unCLIP pipelines load."""
    from infra.store import open_store
    from pipelines.release import diffusers as interop

    say(interop.export(open_store(store, create=False), ref, folder, form))


@releases.command("import")
def releases_import(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that UnCLIPPipeline loads, such as Karlo's.")],
    name: Annotated[str, typer.Option(help="Model line of the release.")] = "karlo",
    images: Annotated[
        Path | None, typer.Option(help="A folder with image_encoder and feature_extractor, if DIR has none.")
    ] = None,
    store: StoreOption = "./store",
) -> None:
    """Makes a folder of diffusers' (Karlo's layout) a release in the store; promotes nothing."""
    from infra.store import open_store
    from pipelines.release import diffusers as interop

    version = interop.import_folder(open_store(store), folder, name, images)[:12]
    say(
        f"{version} is a release of {name}. Draw: unclip generate PROMPT --release {version}. "
        f"Make it the champion: unclip releases promote {version} --name {name}"
    )


def _line(store: Any, name: str | None) -> str:
    from pipelines.release import only_line

    return only_line(store) if name is None else name
