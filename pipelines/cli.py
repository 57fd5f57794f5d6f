"""The command line: one command, one function; what a command needs is imported inside it, so that help is instant."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from pipelines.cli_edit import edit
from pipelines.options import GRID, NameOption, NumberOption, OutOption, ReleaseOption, SeedOption, StoreOption

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="unclip: from image–text pairs on the web to a promoted unCLIP (DALL·E 2-style) release.",
)
releases = typer.Typer(
    no_args_is_help=True, help="Released models: list, show, promote, roll back, verify, export, import."
)
data = typer.Typer(no_args_is_help=True, help="Versions of the data in a store.")
app.add_typer(edit, name="edit")
app.add_typer(releases, name="releases")
app.add_typer(data, name="data")

WIDE = 10_000
"""Columns of a table that no person reads."""

SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one number of the recipe.")
]
RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Name of a recipe that comes with unclip, or a YAML file.")
]


@app.command()
def run(
    recipe: RecipeArgument,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    only: Annotated[str | None, typer.Option(help="This stage alone; its inputs must be there.")] = None,
    address: Annotated[str | None, typer.Option(help="An existing Ray cluster; default: Ray in this process.")] = None,
    store: StoreOption = "./store",
    change: SetOption = None,
) -> None:
    """Runs a recipe: whatever is not there yet is made, everything else is left as it is."""
    from pipelines.run import run_recipe

    run_recipe(recipe, store, change or (), until=until, only=only, address=address)


@app.command()
def plan(
    recipe: RecipeArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    store: StoreOption = "./store",
    change: SetOption = None,
) -> None:
    """Says what a run would do and why, and changes nothing."""
    from pipelines import plan as planning
    from pipelines.run import prepared

    with prepared(recipe, store, change or (), create=False) as job:
        lines = planning.plan(job.stages, job.store)
    if as_json:
        sys.stdout.write(json.dumps(planning.as_json(lines), indent=1) + "\n")
    else:
        _print(planning.as_table(lines))


@app.command()
def submit(
    recipe: RecipeArgument,
    address: Annotated[str, typer.Option(help="The cluster's job server, for instance http://127.0.0.1:8265.")],
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    only: Annotated[str | None, typer.Option(help="This stage alone.")] = None,
    store: StoreOption = "./store",
    change: SetOption = None,
) -> None:
    """Runs a recipe as a Ray job on a cluster; prints the job's id."""
    from pipelines.run import submit_recipe

    _say(submit_recipe(recipe, store, change or (), address, until=until, only=only))


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT…", help="What to draw.")],
    release: ReleaseOption = "champion",
    number: NumberOption = 4,
    seed: SeedOption = 0,
    guidance: Annotated[
        str | None, typer.Option(help="Decoder's ω: ε̂ = (1 − ω)·ε(nothing) + ω·ε(prompt); 1 is unguided.")
    ] = None,
    prior_guidance: Annotated[str | None, typer.Option(help="Prior's ω, likewise; 1 is unguided.")] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL=CLASS", help="Guide towards a class, by the release's classifier."),
    ] = None,
    label_guidance: Annotated[str | None, typer.Option(help="Scale of that guidance; 0 is unguided.")] = None,
    clip_guidance: Annotated[
        str | None, typer.Option(help="Scale of guidance by the release's noised CLIP; 0 is unguided.")
    ] = None,
    out: OutOption = GRID,
    store: StoreOption = "./store",
) -> None:
    """Draws pictures with a release; what is not said comes from the release. An empty prompt draws anything."""
    from infra.store import open_store
    from pipelines.generate import generate as draw

    scales = (_number("--guidance", guidance), _number("--prior-guidance", prior_guidance))
    guides: dict[str, Any] = {
        "labels": _labels(label or ()) or None,
        "label_guidance": _number("--label-guidance", label_guidance),
        "clip_guidance": _number("--clip-guidance", clip_guidance),
    }
    opened = open_store(store, create=False)
    _say(f"wrote {draw(opened, prompts, release, number, seed, *scales, out, **guides)}")


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000,
    store: StoreOption = "./store",
) -> None:
    """Serves MLflow's pages on the store's tracking database, or says where its server has them."""
    from pipelines.registry import tracking_uri

    with _opened(store) as opened:
        uri = tracking_uri(opened)
    if uri.startswith(("http://", "https://")):
        _say(f"MLflow's pages are at {uri}")
        return
    _check_free(port)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--backend-store-uri",
        uri,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    _say(f"MLflow on http://127.0.0.1:{port} (stop with Ctrl-C)")
    os.execv(sys.executable, command)


@releases.command("list")
def releases_list(name: NameOption = None, store: StoreOption = "./store") -> None:
    """Every promotion and rollback of a model line, oldest first."""
    from pipelines import releases as release

    with _opened(store) as opened:
        _print(release.table(opened, _line(opened, name)))


@releases.command("show")
def releases_show(
    ref: Annotated[str, typer.Argument(help="champion, NAME@champion or a version.")] = "champion",
    store: StoreOption = "./store",
) -> None:
    """What a release consists of, its data and its scores, as JSON."""
    from pipelines import releases as release

    with _opened(store) as opened:
        _say(json.dumps(release.show(opened, ref), indent=1, ensure_ascii=False))


@releases.command("promote")
def releases_promote(
    version: Annotated[str, typer.Argument(help="Version of a bundle.")],
    name: NameOption = None,
    reason: Annotated[str, typer.Option(help="Goes into the ledger.")] = "promoted by hand",
    store: StoreOption = "./store",
) -> None:
    """Makes a release the champion."""
    from pipelines import releases as release

    with _opened(store) as opened:
        _say(release.promote(opened, _line(opened, name), version, reason))


@releases.command("rollback")
def releases_rollback(
    name: NameOption = None,
    reason: Annotated[str, typer.Option(help="Goes into the ledger.")] = "rolled back by hand",
    store: StoreOption = "./store",
) -> None:
    """Makes the champion before this one the champion again."""
    from pipelines import releases as release

    with _opened(store) as opened:
        _say(release.rollback(opened, _line(opened, name), reason))


@releases.command("verify")
def releases_verify(name: NameOption = None, store: StoreOption = "./store") -> None:
    """Recomputes the ledger's chain and every digest of its releases."""
    from pipelines import releases as release

    with _opened(store) as opened:
        _say(release.verify(opened, _line(opened, name)))


@releases.command("export")
def releases_export(
    ref: Annotated[str, typer.Argument(metavar="RELEASE", help="champion, NAME@champion, a version, or a folder.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    form: Annotated[str, typer.Option("--format", help="diffusers")] = "diffusers",
    store: StoreOption = "./store",
) -> None:
    """Writes a release as a folder that diffusers' unCLIP pipelines load."""
    from infra.store import open_store
    from pipelines import interop

    _say(interop.export(open_store(store, create=False), ref, folder, form))


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
    from pipelines import interop

    version = interop.bring(open_store(store), folder, name, images)[:12]
    _say(
        f"{version} is a release of {name}. Draw: unclip generate PROMPT --release {version}. "
        f"Make it the champion: unclip releases promote {version} --name {name}"
    )


@data.command("ls")
def data_ls(store: StoreOption = "./store") -> None:
    """Versions of every stage's data in the store."""
    from pipelines import data as versions

    with _opened(store) as opened:
        _print(versions.table(opened))


@data.command("show")
def data_show(
    version: Annotated[str, typer.Argument(help="A version, or the first digits of one.")],
    store: StoreOption = "./store",
) -> None:
    """One version: how it was made, its shards, rows and states, as JSON."""
    from pipelines import data as versions

    with _opened(store) as opened:
        _say(json.dumps(versions.show(opened, version), indent=1, ensure_ascii=False))


@contextlib.contextmanager
def _opened(uri: str) -> Iterator[Any]:
    from infra.store import open_store

    yield open_store(uri, create=False)


def _number(option: str, text: str | None) -> float | None:
    from infra.errors import Refused

    try:
        return None if text is None else float(text)
    except ValueError:
        raise Refused(f"{option} {text!r} is no number; give a guidance scale such as 2 (1 is unguided)") from None


def _labels(said: Sequence[str]) -> dict[str, str]:
    from infra.errors import Refused

    pairs = [text.partition("=") for text in said]
    for text, (label, equals, _) in zip(said, pairs, strict=True):
        if not label or not equals:
            raise Refused(f"--label {text!r}: write it as LABEL=CLASS, for instance --label shape=circle")
    return {label: value for label, _, value in pairs}


def _check_free(port: int) -> None:
    """Refused unless a server can listen there; MLflow itself would say so in thirty lines."""
    from infra.errors import Refused

    if not 0 < port < 65536:
        raise Refused(f"--port {port} is no port; give one from 1 to 65535")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    except OSError as error:
        raise Refused(f"port {port} cannot be had ({error.strerror}); give another with --port") from None


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _print(renderable: Any) -> None:
    """A table: as wide as the terminal; whole lines, nothing cut, where a program reads it."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console(highlight=False).print(renderable, markup=False)
        return
    wide = Console(file=io.StringIO(), width=WIDE, highlight=False, color_system=None)
    wide.print(renderable, markup=False, soft_wrap=True)
    _say("\n".join(line.rstrip() for line in wide.file.getvalue().splitlines()))  # type: ignore[attr-defined]


def _line(store: Any, name: str | None) -> str:
    from pipelines.release import only_line

    return only_line(store) if name is None else name


def main() -> None:
    """Entry point: a user's mistake is one paragraph and an exit code; anything else is our defect."""
    import warnings

    from infra.damage import damaged
    from infra.errors import Refused
    from infra.store import NotFound
    from unclip.errors import Refused as Impossible

    interrupted = _Interrupted()
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    # What a prompt loses is for the person who wrote it, whatever else is quiet.
    logging.getLogger("unclip").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    try:
        app(standalone_mode=True)
    except (KeyboardInterrupt, SystemExit) as end:  # typer makes a Ctrl-C an exit without a word
        if interrupted.seen and (isinstance(end, KeyboardInterrupt) or end.code):
            _end("stopped by Ctrl-C. What finished is kept; the same command goes on from there.", 5)
        raise
    except (Refused, Impossible) as error:
        _end(str(error), getattr(error, "code", 2))
    except NotFound as error:
        _end(str(damaged(error.name, "is missing")), 5)


class _Interrupted:
    """Notes that Ctrl-C was pressed, and lets it take its course. A run has a handler of its own while it works."""

    def __init__(self) -> None:
        self.seen = False
        signal.signal(signal.SIGINT, self)

    def __call__(self, number: int, frame: Any) -> None:
        self.seen = True
        signal.default_int_handler(number, frame)


def _end(said: str, code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.write(f"unclip: {said}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
