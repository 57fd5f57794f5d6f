"""The command line: one command, one function; what a command needs is imported inside it, so that help is instant."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from pipelines.cli.data import data
from pipelines.cli.draw import edit
from pipelines.cli.options import GRID, NumberOption, OutOption, ReleaseOption, SeedOption, StoreOption
from pipelines.cli.releases import releases
from pipelines.cli.terminal import opened, say, show

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="unclip: from image–text pairs on the web to a promoted unCLIP (DALL·E 2-style) release.",
)
app.add_typer(edit, name="edit")
app.add_typer(releases, name="releases")
app.add_typer(data, name="data")

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
    """Says what a run would do and why, and changes nothing.

    Of a source that cannot be read it plans what else there is, says so, and exits with 2.
    """
    from pipelines.engine import plan as planning
    from pipelines.fit import estimate as machine
    from pipelines.run import prepared

    with prepared(recipe, store, change or (), create=False) as job:
        lines = planning.plan(job.stages, job.store)
        todo = {line.stage for line in lines if line.todo != 0}
        needs = machine.needs([stage for stage in job.stages if stage.name in todo], job.recipe.hardware)
    if as_json:
        said = planning.as_json(lines) | {"fits": machine.as_json(needs)}
        sys.stdout.write(json.dumps(said, indent=1) + "\n")
    else:
        show(planning.as_table(lines))
        if needs:
            show("")
            show(machine.as_table(needs))
    if job.missing is not None:
        raise job.missing


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
    from pipelines.submit import submit_recipe

    say(submit_recipe(recipe, store, change or (), address, until=until, only=only))


@app.command("generate")
def generate_grid(
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
        typer.Option(
            metavar="LABEL=CLASS", help="Guide towards a class, by the release's classifier; may be repeated."
        ),
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
    from pipelines.draw import generate_grid as draw

    scales = (_number("--guidance", guidance), _number("--prior-guidance", prior_guidance))
    guides: dict[str, Any] = {
        "labels": _labels(label or ()) or None,
        "label_guidance": _number("--label-guidance", label_guidance),
        "clip_guidance": _number("--clip-guidance", clip_guidance),
    }
    found = open_store(store, create=False)
    say(f"wrote {draw(found, prompts, release, number, seed, *scales, out, **guides)}")


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000,
    store: StoreOption = "./store",
) -> None:
    """Serves MLflow's pages on the store's tracking database, or says where its server has them."""
    from pipelines.promote import tracking_uri

    with opened(store) as found:
        uri = tracking_uri(found)
    if uri.startswith(("http://", "https://")):
        say(f"MLflow's pages are at {uri}")
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
    say(f"MLflow on http://127.0.0.1:{port} (stop with Ctrl-C)")
    os.execv(sys.executable, command)


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


def main() -> None:
    """Entry point: a user's mistake is one paragraph and an exit code; anything else is our defect."""
    import warnings

    from infra.errors import EXPECTED, NotFound, Refused, advice
    from infra.plugins import load_plugins
    from infra.records import damaged
    from unclip.errors import Refused as Impossible

    interrupted = _Interrupted()
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    # What a prompt loses is for the person who wrote it, whatever else is quiet.
    logging.getLogger("unclip").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    try:
        load_plugins()  # which may add commands
        app(standalone_mode=True)
    except (KeyboardInterrupt, SystemExit) as end:  # typer makes a Ctrl-C an exit without a word
        if interrupted.seen and (isinstance(end, KeyboardInterrupt) or end.code):
            _end("stopped by Ctrl-C. What finished is kept; the same command goes on from there.", 5)
        raise
    except (Refused, Impossible) as error:
        _end(str(error), getattr(error, "code", 2))
    except NotFound as error:
        _end(str(damaged(error.name, "is missing")), 5)
    except OSError as error:  # of a file outside the store: a temporary one, or one that was to be written for a person
        if error.errno not in EXPECTED:
            raise
        _end(f"{error.filename or tempfile.gettempdir()}: {advice(error)}", 5)


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
