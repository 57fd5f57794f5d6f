"""Where runs are tracked: MLflow's URI of a store, whether a server answers there, and where events wait for it."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from infra.errors import Refused

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def default_uri(store_uri: str) -> str:
    """Where a store's runs are tracked when no server is named: SQLite in the store's folder.

    SQLite cannot lie in S3: for such a store it lies in the user's state folder, and is one however the URI is written.
    """
    if store_uri.startswith("s3://"):
        bucket, _, prefix = store_uri.removeprefix("s3://").partition("/")
        folder = _state() / "mlflow" / short_digest(f"s3://{bucket}/{prefix.strip('/')}".rstrip("/"))
    else:
        folder = Path(store_uri.removeprefix("file://")).expanduser().absolute() / "mlflow"
    return f"sqlite:///{folder / 'mlflow.db'}"


def database_folder(uri: str) -> Path | None:
    """The folder of an SQLite tracking database, None for any other URI."""
    return Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") else None


def spool_folder(uri: str) -> Path:
    """Where events for this tracking URI wait: beside an SQLite database, else in the user's state folder."""
    return (database_folder(uri) or _state() / "tracking" / short_digest(uri)) / "spool"


def check_server(uri: str, timeout_s: float = 5.0) -> None:
    """Refused, within seconds, if there is no MLflow server at an http(s) URI, or MLflow cannot use the URI."""
    scheme = urlsplit(uri).scheme
    if scheme.split("+")[0] in _DATABASES or scheme.startswith("databricks"):
        return
    if scheme not in ("http", "https"):
        raise Refused(
            f"MLFLOW_TRACKING_URI {uri!r}: use an MLflow server (http://host:5000) or a database (sqlite:///file.db)."
        )
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=timeout_s) as answer:
            answer.read(64)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise Refused(
            f"the MLflow server at {uri} does not answer ({reason}). Start it, correct MLFLOW_TRACKING_URI, or unset "
            "it to track in the store; with --set tracking.required=false the run starts, and MLflow catches up later."
        ) from error


def short_digest(text: str) -> str:
    """A name of 16 digits for any text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _state() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "unclip"
