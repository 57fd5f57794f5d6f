"""A loopback web server that serves the shapes world the way the web does, faults included.

What it answers depends on the URL and the attempt alone. Attempts are counted here, by URL: only "flaky" links look at
the count (503 at the first, the picture from the second on), so a client that tries twice ends with the same pictures
whether or not the server was started anew in between.

Run as `python -m pipelines.shapes.server --port 0`: it prints one line of JSON, {"port": …, "hosts": […]}, when it is
ready. It ends at once on SIGTERM and on a line on its standard input. When that closes without one, or its parent is
gone, whoever started it was killed, and workers may still be downloading: they are to end first, or they would take
refused connections for answers. So it lingers.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

from pipelines.shapes.links import ASTRAY, HOSTS, Link, parse_path
from pipelines.shapes.world import picture_of

_MOVED = "/moved"  # where moved links point to: the same path under this one, without its fault


def encoded(link: Link) -> bytes:
    """A link's picture as PNG; a link that is "tiny" has 8 × 8 pixels."""
    shown = link.shown
    side = 8 if link.fault == "tiny" else 128
    out = io.BytesIO()
    picture = Image.fromarray(picture_of(shown.index, shown.seed, shown.percent / 100, side))
    picture.save(out, "PNG", compress_level=1)  # flat colours: higher levels cost time and save little
    return out.getvalue()


class Server(ThreadingHTTPServer):
    """Serves on loopback; `attempts` counts the requests for each path."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, port: int = 0, seed: int | None = None, slow: float = 0.5) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.seed, self.slow = seed, slow
        self.attempts: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def attempt(self, path: str) -> int:
        """Count one more attempt at a path and return how many there were with it."""
        with self._lock:
            self.attempts[path] += 1
            return self.attempts[path]

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        # A socket that a handler set to linger for no time is to be reset; an orderly shutdown would send FIN first.
        if struct.unpack("ii", request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))[0]:
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        # A client that hangs up, as one that is killed does, is part of a web server's day; all else is a bug to show.
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60
    wbufsize = 1 << 16  # head and body in one packet
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").split(":")[0]
        moved = self.path.startswith(_MOVED)
        link = parse_path(self.path.removeprefix(_MOVED))
        if host not in HOSTS:
            self._answer(421, b"This server knows only " + ", ".join(HOSTS).encode() + b".\n", "text/plain")
        elif link is None or self.server.seed not in (None, link.seed):
            self._answer(404, b"There is nothing here.\n", "text/plain")
        else:
            self._serve(link, None if moved else link.fault, self.server.attempt(self.path))

    def _serve(self, link: Link, fault: str | None, attempt: int) -> None:
        if fault == "missing":
            self._answer(404, b"There is nothing here.\n", "text/plain")
        elif fault == "gone":
            self._answer(410, b"It was here once.\n", "text/plain")
        elif fault == "flaky" and attempt == 1:
            self._answer(503, b"Try again.\n", "text/plain", {"Retry-After": "0"})
        elif fault == "page":
            self._answer(200, b"<!doctype html><title>Gallery</title><p>Please log in.</p>\n", "text/html")
        elif fault == "astray":
            self._answer(302, b"", "text/plain", {"Location": ASTRAY[int(link.variant * len(ASTRAY))]})
        elif fault == "moved":
            other = HOSTS[(HOSTS.index(link.host) + 1) % len(HOSTS)]
            self._answer(301, b"", "text/plain", {"Location": f"http://{other}{_MOVED}{link.path}"})
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        elif fault == "truncated":
            body = encoded(link)
            claimed = len(body) if link.variant < 0.5 else len(body) // 2
            self._answer(200, body[: len(body) // 2], "image/png", {"Connection": "close"}, claimed)
        else:
            if fault == "slow":
                time.sleep(self.server.slow * (0.4 + 0.6 * link.variant))
            self._answer(200, encoded(link), "image/png", {"X-Robots-Tag": "noai"} if fault == "noai" else None)

    def _answer(
        self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None, claimed: int | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if claimed is None else claimed))
        for name, value in (headers or {}).items():
            self.send_header(name, value)  # "Connection: close" also makes the base class hang up
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Ten thousand lines of access log help nobody."""


@contextmanager
def serve(port: int = 0, seed: int | None = None, slow: float = 0.5) -> Iterator[Server]:
    """Serve from a thread until the context ends.

    `port` 0 takes a free one (`server.port`); with a `seed` other seeds' worlds are not found; the latest of the slow
    links answers after `slow` seconds.
    """
    server = Server(port, seed, slow)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    """Serve until SIGTERM or a line on standard input, or for a while after its end or the parent's."""
    parser = argparse.ArgumentParser(description="Serve the shapes world on loopback, faults included.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one (default)")
    parser.add_argument("--seed", type=int, default=None, help="serve the world of this seed alone (default: of any)")
    parser.add_argument("--slow", type=float, default=0.5, help="seconds until the latest slow link answers")
    parser.add_argument("--linger", type=float, default=10.0, help="seconds that it outlives a parent that was killed")
    options = parser.parse_args()
    parent = os.getppid()
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    with serve(options.port, options.seed, options.slow) as server:
        sys.stdout.write(json.dumps({"port": server.port, "hosts": HOSTS}) + "\n")
        sys.stdout.flush()
        while not stopped.is_set() and os.getppid() == parent:
            readable, _, _ = select.select([sys.stdin], [], [], 0.5)
            if readable:
                if os.read(sys.stdin.fileno(), 4096):
                    return
                break
        until = time.monotonic() + options.linger
        while not stopped.is_set() and time.monotonic() < until:
            time.sleep(0.1)


if __name__ == "__main__":
    main()
