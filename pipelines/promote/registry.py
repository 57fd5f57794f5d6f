"""MLflow's model registry as a mirror of the ledger: a registered model a line, a version a release, alias `champion`.

The ledger is the truth. The alias follows it and carries the head's digest: the chain's anchor outside of the store.
Beside infra/tracking/mlflow.py the only file that imports mlflow.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from infra.documents import SCHEMA_VERSION, canonical, digest
from infra.errors import Refused
from infra.ledger import Entry, Ledger
from infra.records import document, object_name
from infra.store import Store
from infra.tracking import check_server, database_folder, default_uri, open_client

ALIAS = "champion"
_HEAD, _NUMBER, _RELEASE = "unclip.ledger.head", "unclip.ledger.number", "unclip.release"


def tracking_uri(store: Store, name: str = "") -> str:
    """The MLflow that a person means who names none: the environment's, else the one that knows the ledger `name`.

    The last is where `mirror` registered it most recently (without a name: any ledger of the store), which may come
    from a recipe; where there is no such note, the store's default. Passwords are not noted: a server that asks for one
    takes it from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or from MLFLOW_TRACKING_URI.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    notes = store.list(f"mirrors/{name}/" if name else "mirrors/")
    newest = max(notes, key=lambda note: (note.modified, note.name), default=None)
    noted = document(store, newest.name)["tracking"] if newest else None
    return noted or default_uri(store.uri)


def mirror(store: Store, name: str, uri: str) -> str:
    """Brings MLflow at `uri` up to the ledger `name`, and says so in a few words. Repeating it changes nothing.

    What was mirrored is noted in the store, so that a run with nothing to do does not load MLflow. A server that does
    not answer, or refuses, is said and not raised: the next run or promotion tries again.
    """
    head = Ledger(store, name).head()
    if head is None:
        return f"no release of {name!r} to register"
    done = f"mirrors/{name}/{digest(canonical([_place(uri), head.digest]))[:32]}.json"
    said = f"model {name!r}, alias {ALIAS}"
    if store.exists(done):
        return said
    try:
        check_server(uri)  # before MLflow is imported, which takes seconds
        _bring_up(open_client(uri), store, name, head)
    except (Refused, _mlflow_error(), OSError) as error:
        reason = str(error).strip().splitlines()[0].partition(". ")[0]
        return f"not registered now ({reason}); the ledger holds, and the next run tries again"
    # The store's own database moves with it and is another on each machine: it is noted as none.
    tracking = None if uri == default_uri(store.uri) else _place(uri)
    store.put_new(done, canonical({"schema_version": SCHEMA_VERSION, "head": head.digest, "tracking": tracking}))
    return said


def anchor(store: Store, name: str) -> str | None:
    """The digest of the ledger's head as MLflow noted it, None where it has noted none; Refused if it cannot say."""
    uri = tracking_uri(store, name)
    folder = database_folder(uri)
    if folder is not None and not (folder / "mlflow.db").exists():
        return None
    check_server(uri)  # before MLflow is imported, which takes seconds
    from mlflow.exceptions import MlflowException

    try:
        return open_client(uri).get_model_version_by_alias(name, ALIAS).tags.get(_HEAD)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no such model; no such alias
            return None
        raise Refused(f"MLflow at {_place(uri)} cannot say what it noted ({error})", code=5) from error


def _bring_up(client: Any, store: Store, name: str, head: Entry) -> None:
    """A version for every release in the ledger that has none, then the alias and its tags."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, tags={"unclip.store": store.uri})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    found = client.search_model_versions(f"name = '{name}'")
    known = {version.tags.get(_RELEASE): version.version for version in found}
    for entry in Ledger(store, name).entries():
        if entry.release not in known:
            tags = {_RELEASE: entry.release, **{key: str(value) for key, value in _numbers(entry).items()}}
            made = client.create_model_version(name, _source(store, entry.release), tags=tags, description=entry.reason)
            known[entry.release] = made.version
    version = known[head.release]
    # The tags first: whoever finds the alias finds the digest that belongs to it.
    client.set_model_version_tag(name, version, _HEAD, head.digest)
    client.set_model_version_tag(name, version, _NUMBER, str(head.number))
    client.set_registered_model_alias(name, ALIAS, version)


def _mlflow_error() -> type[Exception]:
    """MLflow's error type, if MLflow came so far as to raise one."""
    loaded = sys.modules.get("mlflow.exceptions")
    return loaded.MlflowException if loaded else Refused


def _numbers(entry: Entry) -> dict[str, Any]:
    return {f"score.{key}": round(value, 6) for key, value in entry.facts.get("scores", {}).items()}


def _source(store: Store, version: str) -> str:
    """Where the release's manifest lies. MLflow's servers refuse their own files as a source: a folder has a scheme."""
    if store.uri.startswith("s3://"):
        return f"{store.uri}/{object_name(version)}"
    return f"unclip://{Path(store.uri)}/{object_name(version)}"


def _place(uri: str) -> str:
    """The URI without a password."""
    if database_folder(uri) is not None:
        return uri  # a path, in which an @ is an @
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
