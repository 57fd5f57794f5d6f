"""Pictures prepared in processes of their own, where one that ends its decoder costs its row and not the shard.

Decoders are C, and a crash there cannot be caught: it takes the worker with it, and the next one, which is given the
same pictures. So a shard that ended its workers is done again apart (shards.py): a process decodes one picture at a
time, and the row at which it dies ends as `decoder_died`. Its bytes go over a pipe, which is why this is not the rule.
"""

from __future__ import annotations

import os
import pickle
import queue
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

from pipelines.pictures import Picture, PictureSpec, prepare

DIED = "decoder_died"
_LENGTH = struct.Struct(">Q")


class Apart:
    """`prepare` of one spec, in processes that are started as threads ask for them. A context."""

    def __init__(self, spec: PictureSpec) -> None:
        self._spec, self._idle = spec, queue.SimpleQueue[subprocess.Popen[bytes]]()

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *error: object) -> None:
        while not self._idle.empty():
            _end(self._idle.get())

    def prepare(self, body: bytes) -> Picture:
        """What `pictures.prepare` makes of a body; `decoder_died` where that ended the process."""
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = self._start()
        try:
            _send(process.stdin, body)
            picture: Picture = _receive(process.stdout)
        except (EOFError, BrokenPipeError):
            _end(process)
            return Picture(DIED)
        except BaseException:
            _end(process)
            raise
        self._idle.put(process)
        return picture

    def _start(self) -> subprocess.Popen[bytes]:
        path = {"PYTHONPATH": os.pathsep.join(one for one in sys.path if one)}  # a worker of Ray's has its own
        command = [sys.executable, "-m", "pipelines.apart"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | path
        )
        _send(process.stdin, self._spec)
        return process


@contextmanager
def preparing(spec: PictureSpec, apart: bool) -> Iterator[Callable[[bytes], Picture]]:
    """What turns bodies into pictures, for many threads: here, or apart."""
    if not apart:
        yield partial(prepare, spec=spec)
        return
    with Apart(spec) as processes:
        yield processes.prepare


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that waits for a picture, or that is gone."""
    process.kill()
    process.communicate()


def _send(pipe: IO[bytes] | None, what: Any) -> None:
    assert pipe is not None
    data = pickle.dumps(what)
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def _receive(pipe: IO[bytes] | None) -> Any:
    """What was sent, by ourselves on the other side; EOFError where nobody is there any more."""
    assert pipe is not None
    head = pipe.read(_LENGTH.size)
    data = pipe.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else b""
    if not data or len(data) < _LENGTH.unpack(head)[0]:
        raise EOFError("the process at the other end of the pipe is gone")
    return pickle.loads(data)


def main() -> None:
    """Prepares what comes on standard input until it ends, which it does with whoever started this."""
    with os.fdopen(os.dup(0), "rb") as asked, os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what a library prints is no answer
        try:
            spec: PictureSpec = _receive(asked)
            while True:
                _send(answers, prepare(_receive(asked), spec))
        except (EOFError, BrokenPipeError):
            return


if __name__ == "__main__":
    main()
