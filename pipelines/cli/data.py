"""`unclip data`: what data a store holds, what it is like, whether it is whole, what changed, and what is to go."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.options import StoreOption
from pipelines.cli.terminal import columns, meter, say, show, size

if TYPE_CHECKING:
    from pipelines.versions import Account

data = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Versions of the data in a store: list, show, report, verify, compare, clean up, forget.",
)

JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable.")]


@data.command("ls")
def data_ls(store: StoreOption = "./store") -> None:
    """Versions of every stage's data in the store."""
    from infra.store import open_store
    from pipelines.versions import show as versions

    show(versions.table(open_store(store, create=False)))


@data.command("show")
def data_show(
    version: Annotated[str, typer.Argument(help="A version, or the first digits of one.")],
    store: StoreOption = "./store",
) -> None:
    """One version: how it was made, its shards, rows and states, as JSON."""
    from infra.store import open_store
    from pipelines.versions import show as versions

    say(json.dumps(versions.show(open_store(store, create=False), version), indent=1, ensure_ascii=False))


@data.command("verify")
def data_verify(
    version: Annotated[
        list[str] | None, typer.Argument(metavar="[VERSION…]", help="First digits of versions; default: all there is.")
    ] = None,
    mend: Annotated[
        bool, typer.Option("--mend", help="Remove what is damaged and mark it, so that the next run makes it anew.")
    ] = False,
    as_json: JsonOption = False,
    store: StoreOption = "./store",
) -> None:
    """Recomputes the digests of manifests, records and every object that they refer to.

    Says what is missing or damaged, whose it is and how to mend it, and exits with 5 if anything is. What is gone since
    it held forgotten samples is counted apart. Everything is read once: in S3 that is the whole data.
    """
    from infra.errors import Refused
    from infra.store import open_store
    from pipelines.versions import verify as verifying

    opened = open_store(store, create=False)
    with meter("bytes") as told:
        found = verifying.verify(opened, version or (), told=lambda done, total: told("verifying", done, total))
    if as_json:
        say(json.dumps({**vars(found), "findings": [vars(one) for one in found.findings]}, indent=1))
    elif found.findings:
        table = columns("what", "name", "whose", "how to mend it")
        for one in found.findings:
            table.add_row(one.trouble, one.name, one.where, one.mend)
        show(table)
    looked = ", ".join(f"{count} {kind}" for kind, count in sorted(found.count.items()))
    apart = f"; {found.forgotten} objects are gone with forgotten samples" if found.forgotten else ""
    apart += f"; {found.lost} were lost and marked to be made anew" if found.lost else ""
    said = f"{looked or 'nothing'} looked at, {size(found.bytes)}{apart}"
    if found.findings and mend:
        again = verifying.mend(opened, found)
        redo = ", ".join(f"{count} of {stage}" for stage, count in sorted(again.items())) or "nothing"
        said += f". Mended {len(found.findings)}; the next run does again: {redo}"
    elif found.findings:
        raise Refused(f"{said}: {len(found.findings)} of them are missing or damaged.", code=5)
    if not as_json:
        say(f"{said}." if mend and found.findings else f"{said}: all is whole.")


@data.command("diff")
def data_diff(
    a: Annotated[str, typer.Argument(help="First digits of a version, or of a release.")],
    b: Annotated[str, typer.Argument(help="Another of the same stage.")],
    rows: Annotated[Path | None, typer.Option(help="Write each row that differs to this Parquet file.")] = None,
    as_json: JsonOption = False,
    store: StoreOption = "./store",
) -> None:
    """What changed from one version to another: settings, shards, and rows by uid and state.

    Of two releases, every version that they were made from is compared.
    """
    from infra.store import open_store
    from pipelines.versions import diff as comparing

    found = comparing.diff(open_store(store, create=False), a, b, rows)
    if as_json:
        say(json.dumps([comparing.as_json(one) for one in found], indent=1))
    else:
        say("\n".join(comparing.as_text(one) for one in found))


@data.command("report")
def data_report(
    ref: Annotated[
        str,
        typer.Argument(metavar="[REF]", help="First digits of a version, or of a release; default: the newest data."),
    ] = "",
    out: Annotated[Path, typer.Option(help="The page: one HTML file, whole in itself.")] = Path("data.html"),
    store: StoreOption = "./store",
) -> None:
    """Writes a page about the data: reasons, hosts, sides, captions, scores, what each rule took, duplicates, pictures.

    It goes as far as the version given: of a download it tells what was fetched, of a selection what stays.
    """
    from infra.store import open_store
    from pipelines.reports import data as reporting

    page, about = reporting.write(open_store(store, create=False), ref, out)
    say(f"wrote {page}, about {about.version[:12]} of {about.stage}")


@data.command("gc")
def data_gc(
    delete: Annotated[bool, typer.Option("--delete", help="Remove it; without, it is only listed.")] = False,
    keep: Annotated[
        str,
        typer.Option(
            help="all: every version that a manifest lists. newest: the newest of each stage and settings, what was "
            "used lately, and what any release in a ledger came from; pictures of older ones must be fetched again."
        ),
    ] = "all",
    older_than: Annotated[float, typer.Option(metavar="HOURS", help="Spare what was put or used since.")] = 24.0,
    abandoned: Annotated[
        bool, typer.Option("--abandoned", help="Also shards of stages, and checkpoints of models, never finished.")
    ] = False,
    store: StoreOption = "./store",
) -> None:
    """Finds what no manifest, release, unfinished stage or live run refers to; with --delete it goes.

    Goes beside runs; --keep newest and --abandoned wait for none, and are refused while one goes on.
    """
    from infra.errors import Refused
    from infra.store import open_store
    from pipelines.versions import gc

    if keep not in (*gc.Keep,):
        raise Refused(f"--keep {keep!r} is none of {', '.join(gc.Keep)}")
    if not 0 <= older_than < 1e6:
        raise Refused(f"--older-than is {older_than:g}; give hours, 0 or more")
    opened = open_store(store, create=delete)
    with meter() as told:
        found = gc.collect(
            opened, gc.Keep(keep), older_s=older_than * 3600, abandoned=abandoned, delete=delete, told=told
        )
    if found.versions:
        table = columns("version that goes", "stage", "rows", "last used")
        for head in found.versions:
            table.add_row(head.version[:12], head.stage, str(head.rows), f"{head.used:%Y-%m-%d %H:%M}")
        show(table)
    for kind, count in sorted(found.count.items()):
        say(f"{count} {kind}, {size(found.bytes[kind])}")
    young = f" {found.young} more that nothing refers to are too young." if found.young else ""
    total = f"{found.count.total()} files, {size(found.bytes.total())}"
    if delete:
        say(f"removed {total}.{young}")
    else:
        say(f"{total} can go.{young}" + (" To remove them: the same with --delete" if found.count else ""))


@data.command("forget")
def data_forget(
    url: Annotated[list[str] | None, typer.Option(help="As it stands in the list.")] = None,
    uid: Annotated[list[str] | None, typer.Option(help="32 hex digits.")] = None,
    sha256: Annotated[list[str] | None, typer.Option(help="Of the picture as it was fetched; 64 hex digits.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file with a URL, uid or SHA-256 a line.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask, at a terminal.")] = False,
    store: StoreOption = "./store",
) -> None:
    """Takes samples out of the data for good, and names the releases that were trained on them.

    They are never fetched again; the shards that hold them are written anew without them, and what held them is
    removed. The next run redoes what is behind those shards. Without any sample it goes over the data once more for
    all that was ever forgotten, as after a run that was under way meanwhile. A command that was killed: give it again.
    """
    from infra.store import open_store
    from pipelines.versions import forget as forgetting

    names = forgetting.names_of(tuple(url or ()), tuple(uid or ()), tuple(sha256 or ()), file)
    opened = open_store(store, create=not dry_run)
    if dry_run or (sys.stdin.isatty() and not yes):
        with meter() as told:
            _say_account(forgetting.forget(opened, names, dry=True, told=told), "would be")
        if dry_run:
            return
        typer.confirm("This cannot be taken back. Forget them?", abort=True)
    with meter() as told:
        account = forgetting.forget(opened, names, told=told)
    _say_account(account, "were")


def _say_account(account: Account, were: str) -> None:
    say(
        f"{account.samples} rows {were} forgotten: {account.shards} shards {were} written anew, {account.derived} "
        f"records made from them and {account.objects} files {were} removed."
    )
    for one in account.trained:
        say(f"trained on {one.samples} of them: release {one.release[:12]} of {one.name}")
    if account.unknown:
        say(f"not known (data no longer in the store): release {', '.join(one[:12] for one in account.unknown)}")
