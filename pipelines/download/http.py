"""HTTP over connections whose address was checked: dialled, timed as a whole, and kept for the next request.

A kept connection serves the same scheme, host, port and address alone, so whoever takes one has looked the host up and
judged its addresses before, as for a new one. Only an answer that was read to its end, with nothing behind it, leaves
its connection fit to be kept: what a server sends beyond the length that it named never begins another row's answer.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Line = tuple[str, str, int, Address, int]
"""Scheme, host and port of the URL; address and port that were connected to."""


class Connection(http.client.HTTPConnection):
    """A connection to an address that was checked. It never dials by itself: `http.client` would look the host up."""

    auto_open = 0

    def __init__(self, sock: socket.socket, line: Line, default_port: int) -> None:
        _, host, port, _, _ = line
        super().__init__(host, port)  # the port of the URL, not the one connected to, is what the Host header says
        self.line, self.default_port, self.sock, self.kept_at = line, default_port, sock, 0.0

    def get(self, target: str, headers: Mapping[str, str], deadline: float) -> Response:
        """Asks for a target; the answer, of which the head has come. It keeps the deadline (of time.monotonic)."""
        self.sock.settimeout(left(deadline))
        self.response_class = lambda *args, **more: Response(deadline, *args, **more)  # type: ignore[assignment]
        self.request("GET", target, headers=headers)
        return self.getresponse()  # type: ignore[return-value]

    def silent(self) -> bool:
        """Whether the server has neither hung up nor said anything since the last answer."""
        if self.sock is None or (isinstance(self.sock, ssl.SSLSocket) and self.sock.pending()):
            return False  # closed; or of a record's bytes, which are decrypted together, some were not asked for
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not poll.poll(0)


class Connections:
    """Connections that wait for their next request, the newest at the end. Shared by the threads that fetch.

    most: kept at a time, of all hosts; idle_s: how long one is kept, which is less than servers and routers do.
    """

    def __init__(self, most: int = 64, idle_s: float = 4.0) -> None:
        self._most, self._idle_s = most, idle_s
        self._lock, self._kept, self._closed = threading.Lock(), list[Connection](), False

    def take(self, lines: Iterable[Line]) -> Connection | None:
        """The connection that was kept last for the first of these lines that has one, if it can still be used."""
        for line in lines:
            while (found := self._pop(line)) is not None:
                if time.monotonic() - found.kept_at < self._idle_s and found.silent():
                    return found
                found.close()
        return None

    def keep(self, connection: Connection) -> None:
        """Keeps a connection whose last answer was read to its end."""
        connection.kept_at = time.monotonic()
        with self._lock:
            if not self._closed:
                self._kept.append(connection)
                if len(self._kept) <= self._most:
                    return
                connection = self._kept.pop(0)
        connection.close()

    def close(self) -> None:
        """Ends what is kept; nothing is kept from now on."""
        with self._lock:
            self._closed, kept, self._kept = True, self._kept, []
        for connection in kept:
            connection.close()

    def _pop(self, line: Line) -> Connection | None:
        with self._lock:
            for place in reversed(range(len(self._kept))):
                if self._kept[place].line == line:
                    return self._kept.pop(place)
        return None


class Response(http.client.HTTPResponse):
    """An answer whose head and body keep the deadline."""

    def __init__(self, deadline: float, sock: socket.socket, *args: Any, **more: Any) -> None:
        super().__init__(sock, *args, **more)
        self._timed = _Timed(sock, self.fp.detach(), deadline)
        self.fp = self._reader = _Reader(self._timed)

    def complete(self) -> bool:
        """Whether the body was read to its end, with nothing behind it, on a connection that stays open."""
        if self.will_close or not (self.length == 0 or (self.chunked and self.isclosed())):
            return False
        return not (self._reader.behind if self._reader.closed else self._reader.buffered())


class _Timed(io.RawIOBase):
    """A socket's bytes until a deadline: each read gets only the time that is left, so the sum is bounded too."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase, deadline: float) -> None:
        self._sock, self._raw, self._deadline, self.resting = sock, raw, deadline, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.resting:
            return None  # as a socket says that nothing has come yet
        self._sock.settimeout(left(self._deadline))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Reader(io.BufferedReader):
    """A reader that tells what it has read ahead; `behind` is that of a closed one."""

    raw: _Timed
    behind = b""

    def buffered(self) -> bytes:
        """Bytes that have come and were not asked for."""
        self.raw.resting = True  # peek would read where there are none
        try:
            return self.peek()
        finally:
            self.raw.resting = False

    def close(self) -> None:
        if not self.closed:
            self.behind = self.buffered()
        super().close()


def left(deadline: float) -> float:
    """Seconds until the deadline, which are some; TimeoutError once it is over."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the time for this URL is over")
    return seconds


def dial(addresses: list[tuple[Address, int]], deadline: float) -> tuple[socket.socket, tuple[Address, int]]:
    """A connection to the first of these addresses that takes one, and which that is; none is looked up again."""
    failed: OSError = TimeoutError()
    for number, (address, port) in enumerate(addresses):
        sock = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
        try:
            sock.settimeout(left(deadline) / (len(addresses) - number))
            sock.connect((str(address), port))
            return sock, (address, port)
        except OSError as error:
            sock.close()
            failed = error
        except BaseException:
            sock.close()
            raise
    raise failed
