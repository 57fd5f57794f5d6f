"""A shard from a web that means harm: every row ends in its state, nothing private is asked, nothing leaks."""

from __future__ import annotations

import gzip
import io
import itertools
import socket
import struct
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from infra.records.objects import object_name
from infra.records.schemas import KEPT
from infra.store.opening import open_store
from pipelines.download.images import prepare_picture
from pipelines.download.stage import DownloadSpec
from tests.fixtures.stages import download, make
from tests.fixtures.web import cut_chunk, endless, give, reset, serving, trickle
from tests.pipelines.download.test_download import indexes, listed

SPEC = DownloadSpec(size=48, format="png", max_pixels=1_000_000, max_bytes=1 << 20, block=("ads.web.test",))
SECRET = b"<script>steal()</script>"
PAIR = np.random.default_rng(0).integers(0, 255, (2, 48, 64, 3), np.uint8)


def encode(kind: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(PAIR[0]).convert(mode).save(out, kind, **options)
    return out.getvalue()


def frames(kind: str) -> bytes:
    out = io.BytesIO()
    first, second = map(Image.fromarray, PAIR)
    first.save(out, kind, save_all=True, append_images=[second])
    return out.getvalue()


def png(width: int, height: int, depth: int, colour: int, pixels: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG of any header, further chunks and packed pixels, each line behind its filter byte."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    more = [*extra, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunk(*one) for one in more)


def body(data: bytes, **headers: str) -> Callable[[Any], None]:
    return lambda asked: give(asked, body=data, **headers)


def moved(where: str) -> Callable[[Any], None]:
    """A redirect; {port} is the port of both servers."""
    return lambda asked: give(asked, 302, b"", Location=where.format(port=asked.server.port))


def said(*lines: bytes, again: bytes = b"") -> Callable[[Any], None]:
    """An answer of these lines, and then this one for ever."""

    def answer(asked: Any) -> None:
        asked.wfile.write(b"".join(line + b"\r\n" for line in lines))
        while again:
            asked.wfile.write((again + b"\r\n") * 100)

    return answer


def then(*answers: Callable[[Any], None]) -> Callable[[Any], None]:
    """Another answer each time, the last for ever."""
    turn = itertools.chain(answers, itertools.repeat(answers[-1]))
    return lambda asked: next(turn)(asked)


PICTURE = encode()
ZEROS = zlib.compress(bytes(200_000_000), 9)
SCREEN = (
    b"GIF89a"
    + struct.pack("<HHBBB6x", 60_000, 60_000, 0x80, 0, 0)
    + struct.pack("<cHHHHB", b",", 0, 0, 60_000, 60_000, 0)
    + b"\2\2\x4c\1\0;"
)
CHUNKED = b"Transfer-Encoding: chunked"
TURNED = Image.Exif()
TURNED[0x0112] = 6

TABLE: dict[str, tuple[Callable[[Any], None], str]] = {
    "clean": (body(PICTURE), KEPT),
    "missing": (lambda asked: give(asked, 404), "http_404"),
    "forbidden": (lambda asked: give(asked, 403), "http_403"),
    "no-content": (lambda asked: give(asked, 204, b""), "http_204"),
    "recovers": (then(lambda asked: give(asked, 500), body(PICTURE)), KEPT),
    "never-recovers": (lambda asked: give(asked, 500), "http_500"),
    "reset": (reset, "connection"),
    "no-http": (lambda asked: asked.wfile.write(b"SSH-2.0-server\r\n\r\n"), "bad_answer"),
    "silent-then-drip": (lambda asked: trickle(asked, b""), "timeout"),
    "drips-headers": (lambda asked: trickle(asked, b"HTTP/1.1 200 OK\r\nX-Slow: "), "timeout"),
    "drips-body": (lambda asked: trickle(asked, b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"), "timeout"),
    "endless": (endless, "too_many_bytes"),
    "says-huge": (lambda asked: give(asked, body=PICTURE, length=1 << 40), "too_many_bytes"),
    "promises-more": (lambda asked: give(asked, body=PICTURE, length=len(PICTURE) + 9), "truncated"),
    "promises-less": (lambda asked: give(asked, body=PICTURE, length=len(PICTURE) // 2), "truncated"),
    "negative-length": (lambda asked: give(asked, body=PICTURE, length=-5), KEPT),
    "cut-chunk": (cut_chunk, "truncated"),
    "negative-chunk": (said(b"HTTP/1.1 200 OK", CHUNKED, b"", b"-5", b"12345"), "timeout"),
    "no-chunk": (said(b"HTTP/1.1 200 OK", CHUNKED, b"", b"9" * 70_000), "bad_answer"),
    "headers-without-end": (said(b"HTTP/1.1 200 OK", again=b"X-More: and more"), "bad_answer"),
    "header-without-end": (said(b"HTTP/1.1 200 OK", b"X-Long: " + b"x" * (1 << 20)), "bad_answer"),
    "continues-for-ever": (said(again=b"HTTP/1.1 100 Continue\r\n"), "timeout"),
    "trailer-without-end": (said(b"HTTP/1.1 200 OK", CHUNKED, b"", b"0", again=b"X-More: and more"), "timeout"),
    "loop": (moved("/loop"), "too_many_redirects"),
    "loop-of-two": (moved("http://loop-of-two.web.test/and-back"), "too_many_redirects"),
    "to-loopback": (moved("http://127.0.0.2:{port}/private"), "refused_address"),
    "to-loopback-decimal": (moved("http://2130706434:{port}/private"), "refused_address"),
    "to-loopback-octal": (moved("http://0177.0.0.02:{port}/private"), "refused_address"),
    "to-loopback-hex": (moved("http://0x7f000002:{port}/private"), "refused_address"),
    "to-loopback-short": (moved("http://127.2:{port}/private"), "refused_address"),
    "to-loopback-nat64": (moved("http://[64:ff9b::7f00:2]:{port}/private"), "refused_address"),
    "to-loopback-6to4": (moved("http://[2002:7f00:2::]:{port}/private"), "refused_address"),
    "to-loopback-as-user": (moved("http://clean.web.test@127.0.0.2:{port}/private"), "bad_url"),
    "to-loopback-backslash": (moved("http://127.0.0.2:{port}\\@clean.web.test/private"), "bad_url"),
    "to-loopback-by-scheme": (moved("//127.0.0.2:{port}/private"), "refused_address"),
    "to-no-port": (moved("http://clean.web.test:99999/clean"), "bad_url"),
    "to-gopher": (moved("gopher://127.0.0.2:{port}/_GET%20/private"), "refused_scheme"),
    "to-loopback-mapped": (moved("http://[::ffff:127.0.0.2]:{port}/private"), "refused_address"),
    "to-this-host": (moved("http://0.0.0.0:{port}/private"), "refused_address"),
    "to-loopback-6": (moved("http://[::1]:{port}/private"), "refused_address"),
    "to-link-local": (moved("http://169.254.1.1/"), "refused_address"),
    "to-metadata": (moved("http://169.254.169.254/latest/meta-data/"), "refused_address"),
    "to-metadata-mapped": (moved("http://[::ffff:169.254.169.254]/latest/meta-data/"), "refused_address"),
    "to-metadata-6": (moved("http://[fd00:ec2::254]/latest/meta-data/"), "refused_address"),
    "to-file": (moved("file:///etc/passwd"), "refused_scheme"),
    "to-blocked": (moved("http://x.ads.web.test/clean"), "blocked"),
    "bomb-by-header": (body(png(100_000, 100_000, 8, 2, b"")), "too_large"),
    "bomb-by-pixels": (body(png(30_000, 30_000, 1, 0, bytes(3751) * 30_000)), "too_large"),
    "bomb-in-text": (body(png(4, 4, 8, 2, bytes(13) * 4, (b"zTXt", b"k\0\0" + ZEROS))), "broken"),
    "bomb-in-profile": (body(png(4, 4, 8, 2, bytes(13) * 4, (b"iCCP", b"k\0\0" + ZEROS))), "broken"),
    "bomb-by-screen": (body(SCREEN), "too_large"),
    "bomb-by-encoding": (body(gzip.compress(bytes(50_000_000)), Content_Encoding="gzip"), "not_an_image"),
    "half": (body(encode("JPEG")[: len(encode("JPEG")) // 2]), "truncated"),
    "garbage": (body(PICTURE[:60] + b"garbage" * 99), "broken"),
    "polyglot": (body(encode("JPEG", comment=SECRET) + SECRET), KEPT),
    "svg": (
        body(b'<svg xmlns="http://www.w3.org/2000/svg"><rect/></svg>', Content_Type="image/svg+xml"),
        "not_an_image",
    ),
    "animated-gif": (body(frames("GIF")), KEPT),
    "animated-webp": (body(frames("WEBP")), KEPT),
    "cmyk": (body(encode("JPEG", "CMYK")), KEPT),
    "grey-16": (body(encode("PNG", "I;16")), "too_deep"),
    "rgb-16": (body(png(4, 4, 16, 2, bytes(25) * 4)), "too_deep"),
    "turned": (body(encode("JPEG", exif=TURNED)), KEPT),
    "picture-as-page": (body(PICTURE, Content_Type="text/html"), KEPT),
    "page-as-picture": (body(b"<!doctype html><p>Log in", Content_Type="image/png"), "not_an_image"),
    "opt-out": (body(PICTURE, X_Robots_Tag="noai"), "opt_out"),
}
"""Path → what is answered there, and the state that it ends in."""

LONG = "long " * 200_000
ODD: list[tuple[str | None, str | None, str]] = [
    ("http://clean.web.test/clean", "twice", KEPT),
    ("http://clean.web.test/clean", "twice", KEPT),
    ("http://clean.web.test/clean", LONG, KEPT),
    ("http://clean.web.test/clean", "\ufffd\u202e\0 not what it was", KEPT),
    ("http://ADS.web.test./clean", "blocked by name", "blocked"),
    ("http://rebinding.test:{port}/again", "leads to itself, elsewhere by then", "refused_address"),
    ("http://127.0.0.2:{port}/private", "private", "refused_address"),
    ("http://①②⑦.⓪.⓪.②:{port}/private", "private, in circles", "refused_address"),
    ("http://me:secret@clean.web.test/clean", "a password", "bad_url"),
    ("data:image/png;base64,AA", "no address at all", "refused_scheme"),
    (None, "no URL", "no_url"),
    ("http://clean.web.test/clean", None, "no_caption"),
    (None, None, "no_url"),
]
"""URL, caption, state."""


def rebinding(found: Any) -> Callable[..., Any]:
    """A resolver for which a name is at the public server when first asked, and at the private one from then on."""
    asked = itertools.count()

    def look_up(host: str, port: int, *rest: Any, **more: Any) -> Any:
        if host != "rebinding.test":
            return found(host, port, *rest, **more)
        address = "127.0.0.1" if next(asked) == 0 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    return look_up


def peak_bytes() -> int:
    """The most memory that this process held since it last was set back."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(index, members of the tar, states wanted, the public server, the private one, bytes of memory taken)."""
    store = open_store(str(tmp_path_factory.mktemp("hostile") / "store"))
    elsewhere = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch, serving() as web, serving("127.0.0.2", web.port) as private:
        patch.setattr(socket, "getaddrinfo", rebinding(socket.getaddrinfo))
        patch.setattr(tempfile, "tempdir", str(elsewhere))
        web.answers = {f"/{name}": answer for name, (answer, _) in TABLE.items()}
        web.answers["/and-back"] = moved("http://loop-of-two.web.test/loop-of-two")
        web.answers["/again"] = moved("http://rebinding.test:{port}/again")
        private.answers["/private"] = private.answers["/again"] = body(PICTURE)
        rows = [(f"http://{name}.web.test/{name}", name, state) for name, (_, state) in TABLE.items()]
        rows += [(url and url.format(port=web.port), caption, state) for url, caption, state in ODD]
        urls, captions, states = map(list, zip(*rows, strict=True))
        stage = download(
            web.port,
            SPEC,
            timeout_s=1.0,
            retries=1,
            resolve={"*.web.test": f"127.0.0.1:{web.port}"},
            allow=("127.0.0.1/32",),
            contact="people@here.test",
        )
        stage.setup()
        listing = listed(store, pa.table({"url": urls, "caption": captions}))
        with open("/proc/self/clear_refs", "w") as clear:  # 5: the peak begins anew
            clear.write("5")
        before = peak_bytes()
        manifest = make(store, stage, listing)
        taken = peak_bytes() - before
        assert not [one.name for one in threading.enumerate() if one.name.startswith("fetch")]
        (index,) = indexes(store, manifest)
        with tarfile.open(store.local(object_name(manifest.only.sha("images.tar")))) as tar:
            members = [(one.name, tar.extractfile(one).read()) for one in tar]
        assert not [*(store.root / "tmp").iterdir(), *elsewhere.iterdir()]
        yield index.to_pylist(), members, states, web, private, taken


def test_every_row_ends_in_its_named_state(shard: Any) -> None:
    index, _, states, _, _, _ = shard
    assert {row["caption"]: row["state"] for row in index} == {
        row["caption"]: state for row, state in zip(index, states, strict=True)
    }
    assert [row["state"] for row in index] == states


def test_nothing_private_is_connected_to(shard: Any) -> None:
    _, _, _, web, private, _ = shard
    assert private.connections == 0
    assert web.connections > len(TABLE)
    assert not any(host.endswith("ads.web.test") for _, host, _ in web.seen)


def test_nothing_leaks_into_other_rows(shard: Any) -> None:
    index, members, _, _, _, _ = shard
    kept = [row for row in index if row["state"] == KEPT]
    assert [name for name, _ in members[::3]] == [f"{row['uid'].hex()}.png" for row in kept]
    assert [text.decode() for _, text in members[1::3]] == [row["caption"] for row in kept]
    alone = prepare_picture(PICTURE, SPEC).data
    plain = {"clean", "recovers", "negative-length", "picture-as-page", *(caption for _, caption, _ in ODD)}
    for row, (_, data) in zip(kept, members[::3], strict=True):
        assert SECRET not in data
        if row["caption"] in plain:
            assert data == alone, row["caption"]


def test_the_first_frame_of_what_moves_is_kept(shard: Any) -> None:
    index, members, _, _, _, _ = shard
    kept = [row["caption"] for row in index if row["state"] == KEPT]
    for name in ("animated-gif", "animated-webp"):
        shown = np.asarray(Image.open(io.BytesIO(members[3 * kept.index(name)][1])).convert("RGB"), float)
        near, far = (np.abs(shown - np.asarray(picture)).mean() for picture in PAIR)
        assert near < 0.7 * far


def test_memory_holds_no_bomb(shard: Any) -> None:
    *_, taken = shard
    assert taken < 100 << 20  # the smallest of the bombs is 112 MB


def test_everybody_is_told_who_asks(shard: Any) -> None:
    _, _, _, web, _, _ = shard
    (agent,) = {agent for _, _, agent in web.seen}
    assert agent.startswith("unclip/")
    assert agent.endswith("; +people@here.test)")


def test_opt_outs_are_asked_once(shard: Any) -> None:
    _, _, _, web, _, _ = shard
    assert [path for path, _, _ in web.seen].count("/opt-out") == 1
