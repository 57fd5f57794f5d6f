"""What a person does with releases: list, show, promote and roll back by hand, verify, and read at the end of a run."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.documents import digest_file
from infra.errors import NotFound, Refused
from infra.ledger import Entry, Ledger
from infra.records import Manifest, Record, document, object_name, read_object
from infra.store import Store
from pipelines.promote.gate import compared_with
from pipelines.promote.promote import required_head
from pipelines.release import CHAMPION, find_release, release_cache
from pipelines.stage import plain

if TYPE_CHECKING:
    from rich.table import Table


def table(store: Store, name: str) -> Table | str:
    """The ledger for a terminal, the oldest entry first; a sentence where there is none."""
    from rich.table import Table

    entries = list(Ledger(store, name).entries())
    out = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("", "when (UTC)", "what", "release", "gate"):
        out.add_column(title, no_wrap=True)
    for title in ("scores", "why"):
        out.add_column(title, overflow="fold")
    for entry in entries:
        known = entry.facts.get("scores", {})
        shown = "  ".join(f"{key} {known[key]:.3f}" for key in sorted(known) if re.fullmatch(r"[^.]+\.all|cmmd", key))
        mark = "●" if entry == entries[-1] else ""
        gate = entry.gate[:12] if entry.gate else "by hand"
        out.add_row(f"{entry.number}{mark}", entry.time[:16], entry.kind, entry.release[:12], gate, shown, entry.reason)
    if not entries:
        return f"no release of {name!r} was promoted in {store.uri}; its lines: {_lines(store)}"
    return out


def show(store: Store, ref: str) -> dict[str, Any]:
    """What a release consists of, what it was made from, its scores and its entries in the ledgers."""
    version = find_release(store, ref)
    record = Manifest.load(store, version, "bundle").only
    release = json.loads(read_object(store, record.sha("release.json")))
    evaluate = _evaluation(store, version)
    entries = [
        {"ledger": name, "champion": entry == last, **{k: v for k, v in plain(entry).items() if k != "facts"}}
        for name in Ledger.names(store)
        if (last := Ledger(store, name).head())
        for entry in Ledger(store, name).entries()
        if entry.release == version
    ]
    return {
        "version": version,
        **{key: release[key] for key in ("name", "components", "sampling", "data", "clip")},
        "bytes": sum(file.bytes for file in record.files.values()),
        "evaluate": evaluate,
        "scores": Manifest.load(store, evaluate).only.facts.get("scores", {}) if evaluate else {},
        "ledger": entries,
    }


def promote(store: Store, name: str, ref: str, reason: str) -> str:
    """Makes a release the champion by hand, past the gate, and says so."""
    version = find_release(store, ref)
    ledger = Ledger(store, name)
    head = ledger.head()
    if head and head.release == version:
        return f"{version[:12]} is the champion of {name} already (entry {head.number})"
    facts = _facts_of(ledger, version) or {
        "evaluate": (evaluate := _evaluation(store, version)),
        "scores": Manifest.load(store, evaluate).only.facts.get("scores", {}) if evaluate else {},
        "against": compared_with(head, version),
        "after": required_head(head, version),
    }
    entry = ledger.append(Entry("promote", version, None, reason, facts), after=head)
    return f"{version[:12]} is the champion of {name} (entry {entry.number}). {_mirror(store, name)}"


def rollback(store: Store, name: str, reason: str) -> str:
    """Makes the champion before this one the champion again, and says so; Refused where there is none."""
    ledger = Ledger(store, name)
    before: list[str] = []  # champions that stand behind each other, the present one last
    for entry in ledger.entries():
        if entry.kind == "rollback":
            while before and before[-1] != entry.release:
                before.pop()
        else:
            before.append(entry.release)
    if len(before) < 2:
        raise Refused(f"{name!r} has no champion to roll back to in the store {store.uri}")
    head, version = ledger.head(), before[-2]
    entry = ledger.append(Entry("rollback", version, None, reason, _facts_of(ledger, version) or {}), after=head)
    return (
        f"{version[:12]} is the champion of {name} again, {before[-1][:12]} no longer (entry {entry.number}). "
        f"{_mirror(store, name)}"
    )


def verify(store: Store, name: str) -> str:
    """Recomputes the ledger's chain, against MLflow's copy of its head, and every digest of every release in it."""
    from pipelines.promote import registry

    ledger = Ledger(store, name)
    try:
        anchor = registry.anchor(store, name)
        against = "and MLflow noted one of them as the head" if anchor else "and MLflow has noted no head to compare"
    except Refused as error:
        reason = str(error).partition(". ")[0]
        anchor, against = None, f"not compared with the head that MLflow may have noted ({reason})"
    length = ledger.verify(anchor or "")
    if not length:
        raise Refused(f"no release of {name!r} was promoted in {store.uri}; its lines: {_lines(store)}")
    releases = list(dict.fromkeys(entry.release for entry in ledger.entries()))
    checked = {file.sha256 for version in releases for file in _files(store, version)}
    for sha256 in sorted(checked):
        try:
            found = digest_file(store.local(object_name(sha256)))
        except NotFound as error:
            raise Refused(f"{error}: a release of {name} is incomplete", code=5) from error
        if found != sha256:
            raise Refused(f"{object_name(sha256)} was altered: its SHA-256 is {found[:12]}…", code=5)
    return (
        f"{name}: {length} ledger entries are chained, {against}; {len(checked)} files of {len(releases)} releases are "
        "whole"
    )


def summary(store: Store, name: str, made: dict[str, Manifest], store_uri: str, tracking_uri: str) -> Iterator[str]:
    """What a run that promoted says at its end, line by line."""
    from pipelines.promote import registry

    version = made["bundle"].version
    head = Ledger(store, name).head()
    assert head is not None
    option = "" if store_uri == "./store" else f" --store {store_uri}"
    known = head.facts.get("scores", {})
    yield ""
    yield f"champion   {name}@{CHAMPION} is {head.release[:12]} (ledger entry {head.number}, {head.time[:16]} UTC)"
    for kind in sorted(key.removesuffix(".all") for key in known if re.fullmatch(r"[^.]+\.all", key)):
        beside = [f"{at} {known[f'{kind}.{at}.all']:.3f}" for at in ("ceiling", "floor") if f"{kind}.{at}.all" in known]
        yield f"scores     {kind}: all right {known[f'{kind}.all']:.3f} ({', '.join(beside) or 'no true pictures'})"
    yield "scores     " + ", ".join(f"{key} {known[key]:.3f}" for key in ("clip_score", "cmmd") if key in known)
    folder = view_folder(store, version, [made[stage].only for stage in ("evaluate", "report") if stage in made])
    for path in sorted(folder.glob("grid-*.png")):
        yield f"grid       {path}"
    if (folder / "report.html").exists():
        yield f"report     {folder / 'report.html'}"
    mirrored = registry.mirror(store, name, tracking_uri)
    yield f"MLflow     {mirrored}; look: unclip ui{option}"
    release = "" if name == "unclip" else f" --release {name}@{CHAMPION}"
    yield f'generate   unclip generate "a large red circle on a white background" -n 4{release}{option} --out grid.png'


def view_root(store: Store) -> Path:
    """The folder of all copies for people that were made on this machine."""
    return (release_cache() if store.uri.startswith("s3://") else Path(store.uri)) / "view"


def view_folder(store: Store, version: str, records: list[Record]) -> Path:
    """A folder where a person finds these small files (grids, report): view/ in a local store, else in the cache."""
    folder = view_root(store) / version[:12]
    for record in records:
        for name, file in record.files.items():
            target = folder / name
            if not target.exists() or digest_file(target) != file.sha256:
                target.parent.mkdir(parents=True, exist_ok=True)
                fresh = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}")
                shutil.copyfile(store.local(object_name(file.sha256)), fresh)
                os.replace(fresh, target)
    return folder


def _facts_of(ledger: Ledger, version: str) -> dict[str, Any] | None:
    """The facts of the entry that made it champion before, so that its gate and promotion stay found."""
    return next((entry.facts for entry in ledger.entries() if entry.release == version), None)


def _evaluation(store: Store, bundle: str) -> str | None:
    """The newest version of `evaluate` that scored a release."""
    newest: dict[Any, str] = {}
    for entry in store.list("manifests/evaluate-"):
        if re.match(r"manifests/evaluate-\d+/", entry.name):
            head = document(store, entry.name)
            if bundle in head["action"]["inputs"]:
                newest[entry.modified, entry.name] = head["version"]
    return newest[max(newest)] if newest else None


def _files(store: Store, version: str) -> list[Any]:
    return list(Manifest.load(store, version, "bundle").only.files.values())


def _lines(store: Store) -> str:
    return ", ".join(Ledger.names(store)) or "none"


def _mirror(store: Store, name: str) -> str:
    from pipelines.promote import registry

    return registry.mirror(store, name, registry.tracking_uri(store, name)) + "."
