"""A web server for benchmarks: many hosts (addresses of loopback) on one port, some of which never answer.

Run as `python -m tests.benchmarks.web HOSTS HANGING CLOSING DELAY`: it prints its port, and serves until its standard
input ends. A process of its own, so that it takes nothing from the side that is measured but its share of the machine.
"""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

PICTURES = 64
"""Different pictures that are served."""


def address(host: int) -> str:
    """The address of a host; Linux has all of 127.0.0.0/8."""
    return f"127.0.1.{host + 1}"


def pictures() -> list[bytes]:
    """Smooth JPEGs of 320 × 240 pixels, about 20 kB each, as thumbnails of the web are."""
    made = []
    for seed in range(PICTURES):
        noise = np.random.default_rng(seed).integers(0, 255, (40, 50, 3), np.uint8)
        out = io.BytesIO()
        Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        made.append(out.getvalue())
    return made


async def serve(hosts: int, hanging: int, closing: bool, delay_s: float) -> None:
    """Serves until standard input ends. The last `hanging` hosts take connections and never answer; with `closing` the
    others hang up behind each answer, which comes `delay_s` after it was asked for."""
    mute = {address(host) for host in range(hosts - hanging, hosts)}
    bodies = pictures()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            last = False
            while not last:  # as web servers do: a connection stays until its client says, or hangs up
                head = await reader.readuntil(b"\r\n\r\n")
                if writer.get_extra_info("sockname")[0] in mute:
                    await reader.read()  # until the client hangs up
                    return
                last = closing or b"connection: close" in head.lower()
                await asyncio.sleep(delay_s)
                body = bodies[int(head.split(b" ", 2)[1][1:].partition(b".")[0]) % PICTURES]
                lines = [b"HTTP/1.1 200 OK", b"Content-Type: image/jpeg", b"Content-Length: %d" % len(body)]
                writer.write(b"\r\n".join([*lines, *[b"Connection: close"] * last, b"", b""]) + body)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # a client that hung up, or the end of all
        finally:
            writer.close()

    first = await asyncio.start_server(answer, address(0), 0, backlog=1024)
    port = first.sockets[0].getsockname()[1]
    for host in range(1, hosts):
        await asyncio.start_server(answer, address(host), port, backlog=1024)
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)


@contextmanager
def serving(hosts: int, hanging: int, closing: bool = False, delay_s: float = 0.0) -> Iterator[int]:
    """The port of a server that runs until the context ends."""
    asked = [str(hosts), str(hanging), str(int(closing)), str(delay_s)]
    command = [sys.executable, "-m", "tests.benchmarks.web", *asked]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.communicate()  # which ends its standard input


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1", float(sys.argv[4])))
