"""A world beside the run: its list and prompts as files, its web server on loopback while a run downloads.

A recipe names the world's module. From there on the pipeline sees what it sees of any data set: a URL list, HTTP, and
`download.resolve`, which says where the list's made-up hosts live for the time of this run.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from infra.errors import Refused
from pipelines.recipe import World


def _module(world: World, name: str) -> Any:
    try:
        return importlib.import_module(f"{world.module}.{name}")
    except ImportError as error:
        raise Refused(f"world.module {world.module!r} cannot be imported: {error}") from None


def write_list(world: World, folder: Path) -> Path:
    """The world's URL list as Parquet, the same bytes for the same settings."""
    path = folder / "list.parquet"
    _module(world, "lists").write_list(path, world.pictures, world.seed, world.pairs, labels=world.labels)
    return path


def write_prompts(world: World, folder: Path) -> Path:
    """The world's held-out prompts as JSON lines, the same bytes for the same settings."""
    path = folder / "prompts.jsonl"
    _module(world, "lists").write_prompts(path, world.single_prompts, world.pair_prompts, world.seed)
    return path


@dataclass
class Server:
    """The world's web server as a process of its own: started on demand, stopped with the run.

    It is out of the terminal's reach, whose Ctrl-C would end it before the workers that download from it.
    """

    world: World
    process: subprocess.Popen[str] | None = None
    port: int = 0

    def start(self) -> int:
        """Starts it once and returns its port on 127.0.0.1."""
        if self.process is None:
            command = [
                sys.executable,
                "-m",
                f"{self.world.module}.server",
                "--port",
                "0",
                "--seed",
                str(self.world.seed),
            ]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            if not line:
                raise Refused(
                    f"the web server of {self.world.module} did not start (exit {self.process.wait()})", code=5
                )
            self.port = json.loads(line)["port"]
        return self.port

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                self.process.communicate("stop\n", 10)
            self.process.kill()
            self.process.wait()
