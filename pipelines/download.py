"""A slice of the list → a shard of pictures: webdataset tar and an index in which every row of the slice has its state.

Fetching is ours (guard, retries, opt-outs), decoding and resizing img2dataset's. Tars are in list order with times and
owners of zero; how many threads, which ports and how many attempts it took is nowhere in them. What was forgotten
(infra/forgotten.py) is neither fetched nor kept.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from email.message import Message
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import Refused
from infra.forgotten import FORGOTTEN, Forgotten
from infra.manifest import Action, Block, Manifest, Record, canonical, object_name
from infra.rows import INDEX, KEPT, SOURCE
from infra.store import Store
from pipelines.guard import Answer, Fault, Guard, networks
from pipelines.pictures import Picture, PictureSpec, prepare, resizer
from pipelines.redact import redact
from pipelines.stage import plain
from unclip.config import AMOUNT, COUNT, POSITIVE, WHOLE, Range, outside

if TYPE_CHECKING:
    from tenacity import Retrying

TAR, TABLE = "images.tar", "index.parquet"
BLOCK_ROWS = 256
AGENT = "unclip"
SILENT = ("refused_address", "no_address", "connection", "timeout", "tls", "bad_answer")
"""States that a row may end in without a word from its server."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class DownloadSpec(PictureSpec):
    """What is kept of what the web gives, and as what."""

    opt_out: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """Directives of an X-Robots-Tag header that make a picture `opt_out`: it is neither read nor kept."""


@dataclass(frozen=True)
class DownloadHow:
    """How pictures are fetched. It may change which rows fail, never the bytes of a row that succeeds."""

    threads: int = 16
    """Fetches at a time, a task."""
    timeout_s: float = 20.0
    """Seconds for one attempt in all, redirects included."""
    retries: int = 2
    """Further attempts after a failure that may pass: timeouts, resets, cut bodies, 429, 5xx."""
    backoff_s: float = 0.5
    """The wait before the next attempt is random, up to this many seconds, doubling each time (at most 30)."""
    resolve: dict[str, str] = field(default_factory=dict)
    """Host, or *.suffix → address or address:port to connect to instead, as curl's --resolve."""
    allow: tuple[str, ...] = ()
    """Networks (CIDR) that may be reached though they are not public, for pictures on an intranet."""
    contact: str = ""
    """An address where the people whose servers are asked can reach you; it goes into the User-Agent."""
    silent_rows: int = 8
    """A shard is not recorded, and the stage fails, where at least so many rows were tried and no server answered a
    single one: then the network or these settings are at fault, not the hosts, and a record would say for good that the
    pictures are gone. 0: recorded all the same. A smaller shard of dead hosts, as at a list's end, holds nobody up."""
    cpus: float = 1
    """CPUs that Ray reserves a task."""

    def __post_init__(self) -> None:
        ranges = {"threads": COUNT, "timeout_s": POSITIVE, "retries": Range(0, 100), "backoff_s": AMOUNT}
        if wrong := outside(self, **ranges, cpus=AMOUNT, silent_rows=WHOLE):
            raise Refused(f"download.{wrong}")
        if not self.contact.isprintable() or not self.contact.isascii():
            raise Refused("download.contact goes into an HTTP header: write it in ASCII, on one line")
        networks(self.allow)


@dataclass(frozen=True)
class Download:
    """Stage: each slice → `images.tar` and `index.parquet`. Blocks are ranges of the index."""

    spec: DownloadSpec = field(default_factory=DownloadSpec)
    how: DownloadHow = field(default_factory=DownloadHow)
    name: str = "download"
    group: str = "download"
    version: int = 1
    needs: tuple[str, ...] = ("source",)
    kind: str = "task"

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        (source,) = inputs
        for name in source.only.facts["slices"]:
            yield Action(f"{self.name}/{self.version}", plain(self.spec), (source.only.sha(name),))

    def setup(self) -> None:
        """Imports what the first picture would otherwise wait for."""
        resizer(self.spec)

    def run(self, action: Action, store: Store, out: Path) -> Record:
        table = pq.read_table(store.local(object_name(action.inputs[0])))
        rows = table.to_pylist()
        gone = Forgotten.load(store).among(table)
        states = [FORGOTTEN if out else _unfetched(row) for row, out in zip(rows, gone, strict=True)]
        wanted = [number for number, state in enumerate(states) if state is None]
        index: list[dict[str, Any]] = []
        early = {number: Outcome(state) for number, state in enumerate(states) if state}
        with tarfile.open(out / TAR, "w", format=tarfile.USTAR_FORMAT) as tar:
            fetch, reached = self._fetcher(), Reached()
            for which, body in completed(lambda number: fetch(rows[number]["url"]), wanted, self.how.threads):
                reached.add(rows[wanted[which]]["url"], body)
                # In this one thread: decoding needs no more, and rows that came early wait for those before them.
                early[wanted[which]] = outcome(body, self.spec)
                _flush(early, rows, tar, index, self.spec.format)
            _flush(early, rows, tar, index, self.spec.format)
        reached.check(self.how.silent_rows)
        if len(index) != len(rows):
            raise RuntimeError(f"{len(rows)} rows went in and {len(index)} came out")
        keep = table.drop_columns(SOURCE.names)
        columns = {name: [line.get(name) for line in index] for name in INDEX.names}
        columns |= {name: keep[name] for name in keep.column_names}
        made = pa.table(columns, schema=pa.schema([*INDEX, *keep.schema]))
        # Now, since a picture's digest is known only once it is there, and the list may have grown meanwhile.
        gone |= Forgotten.load(store).among(made)
        if gone.any():
            whole = (out / TAR).rename(out / "whole.tar")
            made = redact(whole, made, gone, out / TAR)
            whole.unlink()
        return shard(action, made, out)

    def _fetcher(self) -> Callable[[str], Body]:
        """URL → its body, or the state that says why there is none, after as many attempts as are allowed."""
        guard = Guard(user_agent=user_agent(self.how.contact), resolve=self.how.resolve, allow=self.how.allow)

        def obey(headers: Message) -> None:
            if opted_out(headers, self.spec.opt_out):
                raise Fault("opt_out")

        def fetch(url: str) -> Body:
            try:
                answer: Answer = _retrying(self.how)(
                    guard.fetch, url, max_bytes=self.spec.max_bytes, seconds=self.how.timeout_s, check=obey
                )
            except Fault as fault:
                return Body(fault.state, answered=fault.answered, reason=str(fault))
            return Body(None, answer.body)

        return fetch


def shard(action: Action, index: pa.Table, out: Path, generation: int = 0) -> Record:
    """Writes the index beside the tar in `out`, and returns the record of both."""
    pq.write_table(index, out / TABLE, row_group_size=BLOCK_ROWS, compression="zstd")
    rows = index.num_rows
    blocks = [Block(TABLE, first, min(BLOCK_ROWS, rows - first)) for first in range(0, rows, BLOCK_ROWS)]
    states = Counter(index["state"].to_pylist())
    return Record.of(action, out, states=states, blocks=blocks, generation=generation)


@dataclass(frozen=True)
class Body:
    """What came back for a URL: bytes, or the state that says why none did."""

    state: str | None
    data: bytes = b""
    answered: bool = True
    """Whether a server began an HTTP answer (in the last attempt), whatever it said."""
    reason: str = ""
    """The state in a few words more, for a person."""


@dataclass
class Reached:
    """Whether any server answered for a shard, and what happened instead."""

    answered: bool = False
    silent: Counter[str] = field(default_factory=Counter)
    """State → rows whose server said nothing."""
    examples: dict[str, str] = field(default_factory=dict)
    """State → the first such row, as "host (what happened)"."""

    def add(self, url: str, body: Body) -> None:
        """Counts a row. A URL that is none (bad_url, refused_scheme) says nothing about the network."""
        self.answered = self.answered or body.answered
        if not body.answered and body.state in SILENT:
            self.silent[body.state] += 1
            self.examples.setdefault(body.state, f"{urlsplit(url.strip()).hostname} ({body.reason})")

    def check(self, rows: int) -> None:
        """Raises Refused, code 5, where so many rows (0: never) and more were tried and none was answered."""
        if self.answered or not 0 < rows <= self.silent.total():
            return
        counts = ", ".join(
            f"{count} {state}, such as {self.examples[state]}" for state, count in self.silent.most_common()
        )
        raise Refused(
            f"no server answered for any of {self.silent.total()} rows: {counts}. So nothing was recorded. Does this "
            "machine reach the network, and its DNS? Hosts of an intranet need download.allow, hosts that live "
            "elsewhere download.resolve. If they are really gone, record that: --set download.silent_rows=0",
            code=5,
        )


@dataclass(frozen=True)
class Outcome:
    """A row's final state here; SHA-256 of what was fetched and the picture as far as it got."""

    state: str
    sha256: bytes | None = None
    picture: Picture | None = None


def outcome(body: Body, spec: DownloadSpec) -> Outcome:
    """What becomes of a row whose URL gave this body."""
    if body.state:
        return Outcome(body.state)
    picture = prepare(body.data, spec)
    return Outcome(picture.state or KEPT, hashlib.sha256(body.data).digest(), picture)


def _retrying(how: DownloadHow) -> Retrying:
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

    return Retrying(
        stop=stop_after_attempt(how.retries + 1),
        wait=wait_random_exponential(multiplier=how.backoff_s, max=30),
        retry=retry_if_exception(lambda error: isinstance(error, Fault) and error.transient),
        reraise=True,
    )


def _unfetched(row: dict[str, Any]) -> str | None:
    """The state that a row has without being fetched, or None."""
    if not (row["url"] or "").strip():
        return "no_url"
    return None if (row["caption"] or "").strip() else "no_caption"


def completed(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[tuple[int, Result]]:
    """(position, result) of each item as it is done; at most twice `threads` are under way or unread at a time."""
    flying: dict[Future[Result], int] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool:
        try:
            for position, item in enumerate(items):
                flying[pool.submit(work, item)] = position
                while len(flying) >= 2 * threads:
                    yield from _take(flying)
            while flying:
                yield from _take(flying)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _take(flying: dict[Future[Result], int]) -> Iterator[tuple[int, Result]]:
    done, _ = wait(flying, return_when=FIRST_COMPLETED)
    for future in done:
        yield flying.pop(future), future.result()


def _flush(
    early: dict[int, Outcome],
    rows: Sequence[dict[str, Any]],
    tar: tarfile.TarFile,
    index: list[dict[str, Any]],
    extension: str,
) -> None:
    """Writes all rows that are next in list order: picture, caption and facts into the tar, a line into the index."""
    while len(index) in early:
        got, row = early.pop(len(index)), rows[len(index)]
        line: dict[str, Any] = {name: row[name] for name in ("uid", "url", "caption")}
        line |= {"state": got.state, "sha256": got.sha256}
        if got.picture is not None:
            line |= {"width": got.picture.original_width, "height": got.picture.original_height}
            if got.state == KEPT:
                line["length"] = len(got.picture.data)
                line["offset"] = _add_sample(tar, line, got.picture, extension)
        index.append(line)


def _add_sample(tar: tarfile.TarFile, line: dict[str, Any], picture: Picture, extension: str) -> int:
    """Adds the three members of a webdataset sample and returns where the picture's bytes begin in the tar."""
    name = line["uid"].hex()
    facts = {
        "uid": name,
        "url": line["url"],
        "caption": line["caption"],
        "width": picture.width,
        "height": picture.height,
        "original_width": picture.original_width,
        "original_height": picture.original_height,
        "sha256": line["sha256"].hex(),
    }
    offset = _add(tar, f"{name}.{extension}", picture.data)
    _add(tar, f"{name}.txt", line["caption"].encode())
    _add(tar, f"{name}.json", canonical(facts))
    return offset


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    member = tarfile.TarInfo(name)  # mtime, uid and gid are 0, and owners have no names
    member.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE  # behind the member's header of one block
    tar.addfile(member, io.BytesIO(data))
    return offset


def opted_out(headers: Message, directives: Iterable[str]) -> bool:
    """Whether an X-Robots-Tag header, for everybody or for us by name, has one of these directives."""
    unwanted = {directive.lower() for directive in directives}
    for value in headers.get_all("X-Robots-Tag", []):
        whom, colon, rest = str(value).lower().partition(":")
        if colon and whom.strip() != AGENT:
            continue
        said = rest if colon else whom
        if unwanted & {directive.strip() for directive in said.split(",")}:
            return True
    return False


@cache
def user_agent(contact: str) -> str:
    """What we say we are: "unclip/0.1.0 (image-text data set builder; +contact)"."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        release = version("unclip")
    except PackageNotFoundError:  # run from a checkout that was shipped to the workers
        release = "source"
    return f"{AGENT}/{release} (image-text data set builder{f'; +{contact}' if contact else ''})"
