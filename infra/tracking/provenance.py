"""What a run was made with: the code's state in git, the packages and the machine. Nothing of it is in a key."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path

CODE = Path(__file__).parents[2]
"""Where this code lies: a checkout, or site-packages."""
GIT_VARIABLE = "UNCLIP_GIT"
"""The environment variable that brings git's state to where a job's copy of the code has none."""
TOLD = ("torch", "ray", "mlflow", "numpy", "pyarrow")
"""Packages whose versions are tags, beside the list of all."""


@lru_cache
def git_tags(folder: Path = CODE) -> dict[str, str]:
    """Commit, branch and whether tracked files differ from it, by MLflow's names; of a copy without a repository what
    its sender said; {} where nobody knows."""
    try:
        if Path(_git(folder, "rev-parse", "--show-toplevel")).resolve() == folder.resolve():  # not a repository around
            return {
                "mlflow.source.git.commit": _git(folder, "rev-parse", "HEAD"),
                "mlflow.source.git.branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD"),
                "mlflow.source.git.dirty": str(bool(_git(folder, "status", "--porcelain", "-uno"))).lower(),
            }
    except (OSError, subprocess.SubprocessError):
        pass
    return dict(json.loads(os.environ.get(GIT_VARIABLE, "{}")))


def machine_tags() -> dict[str, str]:
    """Host, CPUs, versions and the digest of requirements.lock, where there is one."""
    known = {one.name: one.version for one in metadata.distributions() if one.name in TOLD}
    lock = CODE / "requirements.lock"
    return {
        "unclip.host": platform.node(),
        "unclip.platform": platform.platform(),
        "unclip.cpus": str(os.cpu_count()),
        "unclip.python": platform.python_version(),
        **{f"unclip.{name}": version for name, version in known.items()},
        **({"unclip.lock": hashlib.sha256(lock.read_bytes()).hexdigest()} if lock.is_file() else {}),
    }


def installed_packages() -> str:
    """Every installed package as `name==version`, a line each, sorted."""
    return "".join(sorted({f"{one.name}=={one.version}\n" for one in metadata.distributions()}, key=str.lower))


def _git(folder: Path, *command: str) -> str:
    told = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, timeout=10, check=True)
    return told.stdout.strip()


def user_name() -> str:
    """Who runs this process: a name, or a number where there is none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())
