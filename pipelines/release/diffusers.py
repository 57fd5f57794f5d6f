"""Releases of a store to and from other programs' folders (`unclip releases export`, `unclip releases import`)."""

from __future__ import annotations

from pathlib import Path

from infra.documents import digest_file
from infra.errors import Refused
from infra.records import Action, Manifest, Record, commit
from infra.store import Store
from pipelines.release.open import open_release

FORMATS = ("diffusers",)


def export(store: Store, ref: str, folder: Path, form: str) -> str:
    """Writes a release for another program and says what became of it; Refused where that cannot hold it."""
    if form not in FORMATS:
        raise Refused(f"--format {form!r} is unknown; use one of {', '.join(FORMATS)}")
    release = open_release(store, ref)
    from unclip.interop import export_diffusers

    done = export_diffusers(release, folder)
    said = f"wrote {folder} for diffusers' UnCLIPPipeline and UnCLIPImageVariationPipeline, pictures of {done.size} px"
    if done.left_out:
        said += f"; left out, since a pipeline has no place for it: {', '.join(done.left_out)}"
    return said


def import_folder(store: Store, folder: Path, name: str, images: Path | None) -> str:
    """Makes a folder that UnCLIPPipeline loads a release of the store, and returns its version.

    It enters no ledger: nobody has judged it. Whoever wants it as champion promotes it by hand.
    """
    from unclip.interop import import_diffusers

    with store.scratch() as scratch:
        import_diffusers(folder, scratch / "release", name=name, images=images)
        # release.json names the digest of every file, so its own is what this release is made from.
        made_from = digest_file(scratch / "release" / "release.json")
        action = Action("bundle/1", {"name": name, "imported": "diffusers"}, (made_from,))
        record = commit(store, action, Record.of(action, scratch / "release"), scratch / "release")
        return Manifest(action, (record,)).save(store)
