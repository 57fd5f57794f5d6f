"""What a download may reach: http and https at public addresses, within bytes, seconds and redirects.

Every address is checked where the connection is made, and the connection goes to the very address that was checked, so
neither a redirect nor a name that resolves differently the second time leads inside. A connection that was kept serves
again only where its host, looked up anew, is still at that very address. Proxies of the environment are not used:
behind one, the address could not be checked. Each refusal and each failure has a name, which becomes the state of the
row.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from functools import cached_property
from urllib.parse import quote, urljoin, urlsplit

from infra.errors import Refused
from pipelines.download.http import Address, Connection, Connections, Response, dial, left

REDIRECTS = (301, 302, 303, 307, 308)
PATIENCE = (408, 425, 429, 500, 502, 503, 504)  # answers that may be another one a moment later
_PORTS = {"http": 80, "https": 443}
_SAFE = "!$%&'()*+,/:;=?@[]~"  # stays as it is in a path or query; "%" too, since most lists come escaped
_CHUNK = 1 << 16
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class Fault(Exception):
    """Why a URL gave nothing. `state` names the reason; `transient` says whether another attempt may do better.

    `answered`: whether any server, also one that redirected, had begun an HTTP answer by then; `fetch` sets it.
    `retry_after`: seconds for which the server asked to be left alone, if it did.
    """

    def __init__(
        self, state: str, message: str = "", *, transient: bool = False, retry_after: float | None = None
    ) -> None:
        super().__init__(message or state)
        self.state, self.transient, self.answered, self.retry_after = state, transient, False, retry_after


@dataclass(frozen=True)
class Answer:
    """A complete answer with status 200: its body, its headers, and the URL that gave it after redirects."""

    body: bytes
    headers: Message
    url: str


class Guard:
    """Fetches what may be fetched. One guard serves many threads.

    resolve: host, or "*.suffix" for all hosts below it → "address" or "address:port" to connect to in its place, as
    curl's --resolve; an address named there is allowed by that. allow: networks (CIDR) that are allowed though they
    are not public. user_agent: what we say we are. blocks: (host, URL) → whether it is never asked, redirects included.
    """

    def __init__(
        self,
        *,
        user_agent: str,
        resolve: Mapping[str, str] | None = None,
        allow: Iterable[str] = (),
        blocks: Callable[[str, str], bool] = lambda host, url: False,
        max_redirects: int = 5,
    ) -> None:
        self._blocks = blocks
        self._resolve = {host.lower().rstrip("."): endpoint(at) for host, at in (resolve or {}).items()}
        self._allow = networks(allow)
        self._headers = {"User-Agent": user_agent, "Accept": "image/*,*/*;q=0.1"}
        self._max_redirects = max_redirects
        self._connections = Connections()

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    def fetch(
        self, url: str, *, max_bytes: int, seconds: float, check: Callable[[Message], None] = lambda _: None
    ) -> Answer:
        """The body behind a URL, following redirects; raises Fault for everything else.

        seconds bounds the whole of it, redirects included, however slowly bytes trickle in (only the system's resolver
        keeps its own time). check sees the final answer's headers before the body is read, and may raise Fault.
        """
        deadline, answered = time.monotonic() + seconds, False
        try:
            for _ in range(self._max_redirects + 1):
                with _faults(seconds), contextlib.ExitStack() as ending:
                    connection, response = self._ask(url, deadline)
                    ending.callback(connection.close)
                    ending.enter_context(response)
                    answered = True
                    if response.status in REDIRECTS and response.headers["Location"]:
                        url = urljoin(url, _location(response.headers["Location"]))
                        continue
                    if response.status != 200:
                        raise Fault(
                            f"http_{response.status}",
                            transient=response.status in PATIENCE,
                            retry_after=retry_after(response.headers) if response.status in PATIENCE else None,
                        )
                    check(response.headers)
                    body = _body(response, max_bytes)
                    if response.complete():
                        ending.pop_all()
                        response.close()
                        self._connections.keep(connection)
                    return Answer(body, response.headers, url)
            raise Fault("too_many_redirects", f"more than {self._max_redirects}")
        except Fault as fault:
            fault.answered = answered
            raise

    def close(self) -> None:
        """Ends the connections that were kept for further requests; those that follow are not kept."""
        self._connections.close()

    def _ask(self, url: str, deadline: float) -> tuple[Connection, Response]:
        """The answer to a GET, of which the head has come, and its connection: one that was kept, or a new one."""
        scheme, host, port = _parts(url)
        target = _target(url)
        where = host if port == _PORTS[scheme] else f"{host}:{port}"
        if self._blocks(host, f"{scheme}://{where}{target}"):
            raise Fault("blocked", f"{host}: blocked by download.block")
        addresses = self.addresses(host, port)
        kept = self._connections.take((scheme, host, port, *one) for one in addresses)
        if kept is not None:
            try:
                return kept, kept.get(target, self._headers, deadline)
            except (ConnectionError, http.client.BadStatusLine, ssl.SSLError):
                kept.close()  # its server hung up meanwhile, as it may: that says nothing about this URL
            except BaseException:
                kept.close()
                raise
        sock, at = dial(addresses, deadline)
        try:
            sock.settimeout(left(deadline))
            if scheme == "https":  # certificate and SNI belong to the name, not to the address
                sock = self._tls.wrap_socket(sock, server_hostname=host)
            connection = Connection(sock, (scheme, host, port, *at), _PORTS[scheme])
            return connection, connection.get(target, self._headers, deadline)
        except BaseException:
            sock.close()
            raise

    def addresses(self, host: str, port: int) -> list[tuple[Address, int]]:
        """Where a host may be connected to, as (address, port); Fault if it has no address, or none that is allowed."""
        named = self._named(host)
        if named:
            return [(named[0], named[1] or port)]
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise Fault("no_address", f"{host}: {error.strerror}", transient=error.errno == socket.EAI_AGAIN) from error
        except UnicodeError as error:
            raise Fault("bad_url", f"{host!r} is no host name") from error
        every = [ipaddress.ip_address(str(where[4][0]).partition("%")[0]) for where in found]
        allowed = [
            one for one in dict.fromkeys(every) if is_public(one) or any(one in network for network in self._allow)
        ]
        if not allowed:
            raise Fault("refused_address", f"{host} is at {every[0]}, which is not public")
        return [(one, port) for one in allowed]

    def _named(self, host: str) -> tuple[Address, int | None] | None:
        host = host.rstrip(".")
        if host in self._resolve:
            return self._resolve[host]
        labels = host.split(".")
        for first in range(1, len(labels)):
            if found := self._resolve.get(".".join(["*", *labels[first:]])):
                return found
        return None


@contextlib.contextmanager
def _faults(seconds: float) -> Iterator[None]:
    """Gives what goes wrong with a connection its name."""
    try:
        yield
    except TimeoutError as error:
        raise Fault("timeout", f"no answer within {seconds:g} s", transient=True) from error
    except ssl.SSLError as error:
        raise Fault("tls", str(error)) from error
    except http.client.RemoteDisconnected as error:
        raise Fault("connection", str(error), transient=True) from error
    except http.client.HTTPException as error:
        raise Fault("bad_answer", f"{type(error).__name__}: {error}") from error
    except OSError as error:
        raise Fault("connection", str(error), transient=True) from error


def is_public(address: Address) -> bool:
    """Whether an address is on the public internet, looking through IPv6 forms that carry an IPv4 address."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def retry_after(headers: Message) -> float | None:
    """Seconds until the time that a Retry-After header names, by number or date; None where it names none."""
    said = (headers["Retry-After"] or "").strip()
    if said.isascii() and said.isdigit():
        return float(said[:10])  # centuries are long enough
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def networks(allow: Iterable[str]) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    """Networks in CIDR notation; Refused where one is none."""
    try:
        return tuple(ipaddress.ip_network(one) for one in allow)
    except ValueError as error:
        raise Refused(f"download.allow: {error}. Write networks as 10.0.0.0/8.") from None


def endpoint(at: str) -> tuple[Address, int | None]:
    """An address with or without a port: "127.0.0.1:8000", "10.0.0.7", "[::1]:80", "::1"; Refused for anything else."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(at.strip("[]")), None
    host, _, port = at.rpartition(":")
    with contextlib.suppress(ValueError):
        if 0 < int(port) < 65536:
            return ipaddress.ip_address(host.strip("[]")), int(port)
    raise Refused(f"download.resolve: {at!r} is no address and port; write 10.0.0.7:80, or 10.0.0.7")


def _parts(url: str) -> tuple[str, str, int]:
    """Scheme, host in ASCII and port of a URL; Fault if it is none that we fetch."""
    try:
        split = urlsplit(url.strip())
        scheme, host, port = split.scheme.lower(), split.hostname or "", split.port
        host.encode("ascii") if host.isascii() else host.encode("idna")
    except ValueError as error:
        raise Fault("bad_url", str(error)) from error
    if scheme not in _PORTS:
        raise Fault("refused_scheme", f"{scheme or 'no scheme'}: only http and https are fetched")
    host = host if host.isascii() else host.encode("idna").decode()
    if not host or not host.isprintable() or any(mark in host for mark in " /\\"):
        raise Fault("bad_url", "no host")
    if split.username is not None:
        raise Fault("bad_url", "a user name in a URL is not sent")
    return scheme, host.lower(), port or _PORTS[scheme]


def _target(url: str) -> str:
    """Path and query as they go over the wire; what a browser would escape is escaped."""
    split = urlsplit(url.strip())
    return quote(split.path or "/", safe=_SAFE) + (f"?{quote(split.query, safe=_SAFE)}" if split.query else "")


def _location(header: str) -> str:
    """Where a redirect leads. http.client reads headers as Latin-1; escaping them as such restores the bytes."""
    return quote(header.strip(), safe=_SAFE + "#", encoding="iso-8859-1")


def _body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """All of the body; Fault if it is longer than max_bytes or shorter than the headers promised."""
    length = response.length  # None if chunked, or without Content-Length
    if length is not None and length > max_bytes:
        raise Fault("too_many_bytes", f"{length} bytes")
    parts, total = [], 0
    try:
        while part := response.read1(_CHUNK):
            parts.append(part)
            total += len(part)
            if total > max_bytes:
                raise Fault("too_many_bytes", f"more than {max_bytes} bytes")
    except http.client.IncompleteRead as error:
        raise Fault("truncated", "the connection ended within a chunk", transient=True) from error
    if length is not None and total < length:
        raise Fault("truncated", f"{total} of {length} bytes came", transient=True)
    return b"".join(parts)
