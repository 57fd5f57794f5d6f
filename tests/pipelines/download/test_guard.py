"""What a download may reach, over real sockets."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.errors import Refused
from pipelines.download.guard import Fault, Guard, endpoint, is_public
from tests.fixtures.web import BODY, Web, cut_chunk, endless, give, reset, serving, trickle


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as server:
        server.answers["/ok.png"] = give
        yield server


def guard(web: Web, **options: Any) -> Guard:
    return Guard(user_agent="test/1", resolve={"*.web.test": f"127.0.0.1:{web.port}"}, **options)


def state(guard: Guard, url: str, *, seconds: float = 5.0, max_bytes: int = 1 << 20) -> str:
    with pytest.raises(Fault) as fault:
        guard.fetch(url, max_bytes=max_bytes, seconds=seconds)
    return fault.value.state


def test_a_named_host_is_reached_under_its_own_name(web):
    answer = guard(web).fetch("http://a.web.test/ok.png", max_bytes=1 << 20, seconds=5)
    assert answer.body == BODY
    assert web.seen == [("/ok.png", "a.web.test", "test/1")]
    guard(web).fetch("http://a.web.test:8080/ok.png#part", max_bytes=1 << 20, seconds=5)
    assert web.seen[1] == ("/ok.png", "a.web.test:8080", "test/1")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/ok.png",
        "http://localhost:{port}/ok.png",
        "http://2130706433:{port}/ok.png",
        "http://0x7f.1:{port}/ok.png",
        "http://[::1]:{port}/ok.png",
        "http://[::ffff:127.0.0.1]:{port}/ok.png",
        "http://0.0.0.0:{port}/ok.png",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.1.2.3/",
        "http://192.168.0.1/",
        "http://[fd00:ec2::254]/",
    ],
)
def test_addresses_that_are_not_public_are_refused(web, url):
    assert state(guard(web), url.format(port=web.port)) == "refused_address"
    assert web.seen == []


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://a.web.test/x", "data:image/png;base64,AA", "/etc/passwd", ""]
)
def test_schemes_but_http_and_https_are_refused(web, url):
    assert state(guard(web), url) == "refused_scheme"


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///x",
        "http://a b.test/",
        "http://x.test:99999/",
        "http://me:secret@a.web.test/ok.png",
        "http://[::1/",
    ],
)
def test_broken_urls_are_named_so(web, url):
    assert state(guard(web), url) == "bad_url"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.215.14", True),
        ("2606:4700::1111", True),
        ("100.64.0.1", False),
        ("172.16.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("192.0.2.1", False),
        ("198.18.0.1", False),
        ("::", False),
        ("fe80::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("2001:db8::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::5db8:d70e", True),
        ("::127.0.0.1", False),
    ],
)
def test_what_a_public_address_is(address, expected):
    assert is_public(ipaddress.ip_address(address)) is expected


def test_networks_that_the_operator_allows_are_reached_and_no_others(web):
    url = f"http://127.0.0.1:{web.port}/ok.png"
    assert guard(web, allow=["127.0.0.0/8"]).fetch(url, max_bytes=1 << 20, seconds=5).body == BODY
    assert state(guard(web, allow=["10.0.0.0/8"]), url) == "refused_address"


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("http://127.0.0.1:{port}/ok.png", "refused_address"),
        ("http://169.254.169.254/latest/meta-data/", "refused_address"),
        ("file:///etc/passwd", "refused_scheme"),
        ("http://c.web.test/away.png", "too_many_redirects"),
        ("/nowhere.png", "http_404"),
    ],
)
def test_redirects_are_checked_like_the_first_address(web, location, expected):
    web.answers["/away.png"] = lambda asked: give(asked, 302, b"", Location=location.format(port=web.port))
    assert state(guard(web), "http://a.web.test/away.png") == expected


def test_redirects_lead_to_other_hosts_and_escape_what_is_not_ascii(web):
    web.answers["/moved.png"] = lambda asked: give(asked, 301, b"", Location="//b.web.test/a b/ü.png?q=1 2")
    web.answers["/a%20b/%FC.png?q=1%202"] = give
    answer = guard(web).fetch("http://a.web.test/moved.png", max_bytes=1 << 20, seconds=5)
    assert answer.body == BODY
    assert web.seen[-1][:2] == ("/a%20b/%FC.png?q=1%202", "b.web.test")


def test_paths_are_escaped_as_a_browser_does(web):
    web.answers["/%C3%BC%20%41.png?a=b&c=%5B1]"] = give
    guard(web).fetch("http://a.web.test/ü %41.png?a=b&c=%5B1]", max_bytes=1 << 20, seconds=5)
    assert len(web.seen) == 1


def test_the_connection_goes_to_the_address_that_was_checked(web, monkeypatch):
    looked_up = []

    def rebinding(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        looked_up.append(host)
        address = "127.0.0.1" if len(looked_up) == 1 else "10.255.255.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    url = f"http://rebinding.test:{web.port}/ok.png"
    answer = guard(web, allow=["127.0.0.1/32"]).fetch(url, max_bytes=1 << 20, seconds=2)
    assert answer.body == BODY
    assert looked_up == ["rebinding.test"]
    assert state(guard(web, allow=["127.0.0.1/32"]), url) == "refused_address"


def test_an_address_inside_does_not_hide_behind_one_outside(web, monkeypatch):
    both = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", web.port)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", web.port)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    found = guard(web, allow=["127.0.0.1/32"]).addresses("two.test", web.port)
    assert [str(address) for address, _ in found] == ["127.0.0.1"]


def test_bodies_that_are_too_long_are_not_read(web):
    web.answers["/endless.png"] = endless
    assert state(guard(web), "http://a.web.test/ok.png", max_bytes=len(BODY) - 1) == "too_many_bytes"
    assert state(guard(web), "http://a.web.test/endless.png", max_bytes=50_000) == "too_many_bytes"
    assert guard(web).fetch("http://a.web.test/ok.png", max_bytes=len(BODY), seconds=5).body == BODY


def test_bodies_that_end_early_are_truncated(web):
    web.answers["/short.png"] = lambda asked: give(asked, length=len(BODY) * 2)
    web.answers["/chunk.png"] = cut_chunk
    assert state(guard(web), "http://a.web.test/short.png") == "truncated"
    assert state(guard(web), "http://a.web.test/chunk.png") == "truncated"


@pytest.mark.parametrize(
    "head", [b"", b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"]
)
def test_seconds_bound_the_whole_answer_however_it_trickles(web, head):
    web.answers["/slow.png"] = lambda asked: trickle(asked, head)
    began = time.monotonic()
    assert state(guard(web), "http://a.web.test/slow.png", seconds=0.3) == "timeout"
    assert time.monotonic() - began < 60  # each byte comes well within 0.3 s; all of them would take minutes


def test_redirects_share_one_budget_of_time(web):
    def later(asked: Any) -> None:
        time.sleep(0.2)
        give(asked, 302, b"", Location=f"/{len(web.seen)}")

    web.answers.update({"/start": later, **{f"/{number}": later for number in range(10)}})
    assert state(guard(web, max_redirects=9), "http://a.web.test/start", seconds=0.5) == "timeout"
    assert len(web.seen) <= 4


def test_failures_have_names_and_say_whether_to_try_again(web):
    web.answers["/reset.png"] = reset
    web.answers["/busy.png"] = lambda asked: give(asked, 503)
    web.answers["/gone.png"] = lambda asked: give(asked, 410)
    web.answers["/astray.png"] = lambda asked: give(asked, 302, Location="http://10.1.2.3/")
    web.answers["/nonsense.png"] = lambda asked: asked.wfile.write(b"SSH-2.0-server\r\n\r\n")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = Guard(user_agent="test/1", resolve={"nobody.test": f"127.0.0.1:{closed.getsockname()[1]}"})
        expected = {
            (guard(web), "http://a.web.test/reset.png"): ("connection", True),
            (guard(web), "http://a.web.test/busy.png"): ("http_503", True),
            (guard(web), "http://a.web.test/gone.png"): ("http_410", False),
            (guard(web), "http://a.web.test/astray.png"): ("refused_address", False),
            (guard(web), "http://a.web.test/nonsense.png"): ("bad_answer", False),
            (guard(web), "http://no-such-host.invalid/"): ("no_address", None),
            (nobody, "http://nobody.test/"): ("connection", True),
        }
        for (by, url), (name, transient) in expected.items():
            with pytest.raises(Fault) as fault:
                by.fetch(url, max_bytes=1 << 20, seconds=5)
            assert fault.value.state == name, url
            assert transient is None or fault.value.transient is transient, url  # a resolver's silence may be either
            assert fault.value.answered == any(word in url for word in ("busy", "gone", "astray")), url


def test_headers_can_be_judged_before_the_body_is_read(web):
    def judge(headers: Any) -> None:
        assert headers["X-Robots-Tag"] == "noai"
        raise Fault("opt_out")

    web.answers["/endless.png"] = lambda asked: give(asked, body=b"", length=10**9, X_Robots_Tag="noai")
    with pytest.raises(Fault, match="opt_out"):
        guard(web).fetch("http://a.web.test/endless.png", max_bytes=10**10, seconds=5, check=judge)


def test_proxies_of_the_environment_are_not_asked(web, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert guard(web).fetch("http://a.web.test/ok.png", max_bytes=1 << 20, seconds=5).body == BODY


def test_the_longest_name_decides_where_a_host_lives():
    by = Guard(
        user_agent="test/1",
        resolve={
            "*.test": "10.0.0.1",
            "*.web.test": "10.0.0.2:81",
            "A.web.test.": "10.0.0.3:82",
            "v6.test": "[fd00::1]:83",
        },
    )
    where = {
        host: by.addresses(host, 80)[0] for host in ("x.test", "b.web.test", "c.d.web.test", "a.web.test", "v6.test")
    }
    assert {host: (str(address), port) for host, (address, port) in where.items()} == {
        "x.test": ("10.0.0.1", 80),
        "b.web.test": ("10.0.0.2", 81),
        "c.d.web.test": ("10.0.0.2", 81),
        "a.web.test": ("10.0.0.3", 82),
        "v6.test": ("fd00::1", 83),
    }


@pytest.mark.parametrize("at", ["world", "example.test:80", "127.0.0.1:0", "127.0.0.1:99999", ":80", ""])
def test_places_that_are_no_address_are_refused(at):
    with pytest.raises(Refused, match=r"download\.resolve"):
        endpoint(at)
    with pytest.raises(Refused, match=r"download\.allow"):
        Guard(user_agent="test/1", allow=["10.0.0.0/99"])


def test_certificates_are_checked_for_the_name_not_the_address(web, tmp_path, monkeypatch):
    certificate(tmp_path, "secure.web.test")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    asked_for = []
    context.sni_callback = lambda _, name, __: asked_for.append(name)
    web.socket = context.wrap_socket(web.socket, server_side=True)
    assert state(guard(web), "https://secure.web.test/ok.png") == "tls"
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    trusting = guard(web)
    answer = trusting.fetch("https://secure.web.test/ok.png", max_bytes=1 << 20, seconds=5)
    assert answer.body == BODY
    assert asked_for[-1] == "secure.web.test"
    assert web.seen[-1][1] == "secure.web.test"
    assert state(trusting, "https://other.web.test/ok.png") == "tls"


def certificate(folder: Path, name: str) -> None:
    """A self-signed certificate for one name: cert.pem and key.pem."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    kind = serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption()))
