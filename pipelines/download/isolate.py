"""Pictures prepared in processes of their own, where one that ends or holds its decoder costs its row, not the shard.

Decoders are C, and a crash there cannot be caught: it takes the worker with it, and the next one, which is given the
same pictures. So a shard that ended its workers is done again apart (ray_shards.py): a process decodes one picture at a
time, and the row at which it dies ends as `decoder_died`. Nor can a decoder be stopped that never comes back: elsewhere
that ends the worker (watchdog.py), here the process alone, and the row as `decoder_hung`. Bytes go over a pipe,
which is why this is not the rule.
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
from multiprocessing.connection import wait
from typing import IO, Any

from infra.errors import Refused
from pipelines.download.images import Picture, PictureSpec, prepare_picture, resizer
from pipelines.download.watchdog import Watchdog

DIED, HUNG = "decoder_died", "decoder_hung"
_LENGTH = struct.Struct(">Q")


class IsolatedDecoder:
    """`prepare_picture` of one spec, in processes that are started as threads ask for them. A context.

    seconds: how long a picture may be with its decoder.
    """

    def __init__(self, spec: PictureSpec, seconds: float) -> None:
        self._spec, self._seconds = spec, seconds
        self._idle = queue.SimpleQueue[subprocess.Popen[bytes]]()

    def __enter__(self) -> IsolatedDecoder:
        return self

    def __exit__(self, *error: object) -> None:
        while not self._idle.empty():
            _end(self._idle.get())

    def prepare(self, body: bytes) -> Picture:
        """What `prepare_picture` makes of a body; `decoder_died` where that ended the process, `decoder_hung` where it
        took too long. Refused, code 5, where no process can be started."""
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = self._start()
        try:
            _send(process.stdin, body)
            picture: Picture = _receive(process.stdout, self._seconds)
        except (EOFError, BrokenPipeError):
            _end(process)
            return Picture(DIED)
        except TimeoutError:
            _end(process)
            return Picture(HUNG)
        except BaseException:
            _end(process)
            raise
        self._idle.put(process)
        return picture

    def _start(self) -> subprocess.Popen[bytes]:
        path = {"PYTHONPATH": os.pathsep.join(one for one in sys.path if one)}  # a worker of Ray's has its own
        command = [sys.executable, "-m", "pipelines.download.isolate"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | path
        )
        try:
            _send(process.stdin, self._spec)
            _receive(process.stdout)  # it has imported what it needs, which no picture is to wait for
        except (EOFError, BrokenPipeError) as error:
            _end(process)
            raise Refused(
                "a process that was to decode pictures ended before it had one: its node is short of memory, or its "
                f"environment is not that of the worker ({sys.executable} -m pipelines.download.isolate)",
                code=5,
            ) from error
        except BaseException:
            _end(process)
            raise
        return process


@contextmanager
def picture_decoder(spec: PictureSpec, apart: bool, seconds: float) -> Iterator[Callable[[bytes], Picture]]:
    """What turns bodies into pictures, for many threads, each picture in so many seconds: here, or apart."""
    with IsolatedDecoder(spec, seconds) if apart else Watchdog(spec, seconds) as processes:
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


def _receive(pipe: IO[bytes] | None, seconds: float | None = None) -> Any:
    """What was sent, by ourselves on the other side; EOFError where nobody is there any more, TimeoutError where
    nothing came in so many seconds."""
    assert pipe is not None
    if seconds is not None and not wait([pipe], seconds):  # type: ignore[list-item]  # whatever has a fileno
        raise TimeoutError
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
            resizer(spec)
            _send(answers, "ready")
            while True:
                _send(answers, prepare_picture(_receive(asked), spec))
        except (EOFError, BrokenPipeError):
            return


if __name__ == "__main__":
    main()
