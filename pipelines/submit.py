"""A recipe as a job of a Ray cluster."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from infra.errors import Refused
from infra.plugins import VARIABLE
from infra.tracking import GIT_VARIABLE, git_tags
from pipelines.recipe import schema as recipes
from pipelines.recipe import stages as workflow
from pipelines.stage import error_context


def submit_recipe(
    name: str, store: str, changes: Sequence[str], address: str, *, until: str | None, only: str | None
) -> str:
    """Submits `unclip run` as a Ray job and returns its id; the recipe is checked here first."""
    from infra.cluster import submit

    if "://" not in store:
        if urlsplit(address if "://" in address else f"//{address}").hostname not in ("127.0.0.1", "localhost", "::1"):
            raise Refused(
                f"A job on {address} cannot reach the folder {store!r} of this machine: give --store s3://bucket/prefix"
            )
        store = str(Path(store).resolve())
    recipe = recipes.load(name, changes)
    with error_context(f"Recipe {name}"):
        workflow.models(recipe)
    command = ["python", "-m", "pipelines.cli", "run", name, "--store", store, "--address", "auto"]
    for change in changes:
        command += ["--set", change]
    for option, value in (("--until", until), ("--only", only)):
        command += [option, value] if value else []
    passed = (
        "MLFLOW_TRACKING_URI",
        "AWS_ENDPOINT_URL",
        "AWS_DEFAULT_REGION",
        VARIABLE,
    )  # no secrets: those are the cluster's own
    environment = {name: os.environ[name] for name in passed if name in os.environ}
    environment[GIT_VARIABLE] = json.dumps(git_tags())  # the job's copy of the code has no repository
    return submit(address, shlex.join(command), str(Path.cwd()), environment)
