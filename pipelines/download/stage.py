"""A slice of the list → a shard of pictures: webdataset tar and an index in which every row of the slice has its state.

Fetching is ours (guard, turns, opt-outs), decoding and resizing img2dataset's. How many threads, which ports and how
many attempts it took is nowhere in a shard (shard.py writes it).
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from email.message import Message
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.parquet as pq

from infra.errors import Refused
from infra.records import FORGOTTEN, KEPT, SOURCE, Action, Record, current_record, object_name
from infra.store import Store
from pipelines.download.blocklist import Blocklist, blocklist, entries_digest, read_file
from pipelines.download.guard import PATIENCE, Fault, Guard, networks
from pipelines.download.images import DECODE_S, PictureSpec
from pipelines.download.isolate import picture_decoder
from pipelines.download.schedule import FetchPolicy, fetch_all
from pipelines.download.shard import Earlier, Outcome, Packing, pack
from unclip.config import AMOUNT, LATER, POSITIVE, WHOLE, outside

AGENT = "unclip"
SILENT = ("refused_address", "no_address", "connection", "timeout", "host_timeout", "tls", "bad_answer")
"""States that a row may end in without a word from its server."""
PASSING = (
    "timeout",
    "host_timeout",
    "host_busy",
    "connection",
    "no_address",
    "truncated",
    *map("http_{}".format, PATIENCE),
)
"""States that may be others on another day."""
FINAL = (KEPT, FORGOTTEN, "opt_out", "blocked", "no_url", "no_caption")
"""States of rows that are never asked again."""


@dataclass(frozen=True)
class DownloadSpec(PictureSpec):
    """What is kept of what the web gives, and as what."""

    opt_out: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """Directives of an X-Robots-Tag header that make a picture `opt_out`: it is neither read nor kept."""
    block: tuple[str, ...] = field(default=(), metadata=LATER)
    """What is never asked, redirects included, and ends as `blocked`: hosts ("ads.test", with all hosts below it), and
    patterns of whole URLs ("http*://*/ads/*"), which have a slash."""
    block_sha256: str = field(default="", metadata=LATER)
    """SHA-256 of the entries of `block_file`, found out where the recipe is; "" without such a file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Blocklist(self.block)


@dataclass(frozen=True)
class DownloadHow(FetchPolicy):
    """How pictures are fetched. It may change which rows fail, never the bytes of a row that succeeds."""

    timeout_s: float = 20.0
    """Seconds for one attempt in all, redirects included."""
    resolve: dict[str, str] = field(default_factory=dict)
    """Host, or *.suffix → address or address:port to connect to instead, as curl's --resolve."""
    allow: tuple[str, ...] = ()
    """Networks (CIDR) that may be reached though they are not public, for pictures on an intranet."""
    block_file: str = ""
    """A file, as a path or s3://bucket/name, with more of what `block` names, an entry a line; "#" begins a comment. It
    is read where the recipe is. What it blocks is in the key, its comments, order and place are not."""
    contact: str = ""
    """An address where the people whose servers are asked can reach you; it goes into the User-Agent."""
    silent_rows: int = 8
    """A shard is not recorded, and the stage fails, where at least so many rows were tried and no server answered a
    single one: then the network or these settings are at fault, not the hosts, and a record would say for good that the
    pictures are gone. 0: recorded all the same. A smaller shard of dead hosts, as at a list's end, holds nobody up."""
    retry_pass: int = 0
    """How often the failed rows of shards that are there already are asked once more: each pass writes the next
    generation of the shards that have rows in `retry_states`, and touches no other row. The number is the generation
    to be reached (forgetting makes generations as well): a pass that was made is not made again until it is raised."""
    retry_states: tuple[str, ...] = PASSING
    """Which failed rows those are. Rows that were kept, blocked or opted out are never asked again."""
    isolate: bool = False
    """Whether pictures are decoded in processes of their own, so that one which ends or holds its decoder costs its row
    alone. A shard that ended its workers is done so in any case."""
    decode_s: float = 60.0
    """Seconds that a picture may be with its decoder. A worker with one that takes longer is ended, as a crash would
    end it; isolated, the row ends as `decoder_hung`."""
    cpus: float = 1
    """CPUs that Ray reserves a task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges = {
            "timeout_s": POSITIVE,
            "cpus": AMOUNT,
            "silent_rows": WHOLE,
            "retry_pass": WHOLE,
            "decode_s": DECODE_S,
        }
        if wrong := outside(self, **ranges):
            raise Refused(f"download.{wrong}")
        if not self.contact.isprintable() or not self.contact.isascii():
            raise Refused("download.contact goes into an HTTP header: write it in ASCII, on one line")
        if never := [state for state in self.retry_states if state in FINAL]:
            raise Refused(f"download.retry_states names {never[0]!r}: such rows are never asked again")
        networks(self.allow)


@dataclass(frozen=True)
class Download(Packing):
    """Stage: each slice → a shard of what the web gives for it."""

    spec: DownloadSpec = field(default_factory=DownloadSpec)
    how: DownloadHow = field(default_factory=DownloadHow)
    entries: tuple[str, ...] = field(default=(), repr=False)
    """Of `how.block_file`; their digest is `spec.block_sha256`."""

    def __post_init__(self) -> None:
        if self.spec.block_sha256 != entries_digest(self.entries):
            raise Refused("download.block_sha256 is not the digest of the entries; make the stage with Download.of")

    @classmethod
    def of(cls, spec: DownloadSpec, how: DownloadHow) -> Download:
        """The stage with what its block list's file says; Refused, naming file and line, where that is none."""
        entries = read_file(how.block_file) if how.block_file else ()
        return cls(spec=replace(spec, block_sha256=entries_digest(entries)), how=how, entries=entries)

    def carefully(self) -> Download:
        """The stage as it does a shard that ended its workers."""
        return replace(self, how=replace(self.how, isolate=True))

    def stale(self, record: Record) -> bool:
        """Whether the next generation of a record is asked for (`retry_pass`), and there is something to ask for."""
        return record.generation < self.how.retry_pass and not record.states.keys().isdisjoint(self.how.retry_states)

    def run(self, action: Action, store: Store, out: Path) -> Record:
        before = current_record(store, action)
        if before is not None and not self.stale(before):  # a task that died behind its commit is run once more
            for name, file in before.files.items():
                shutil.copyfile(store.local(object_name(file.sha256)), out / name)
            return before
        table = pq.read_table(store.local(object_name(action.inputs[0])))
        rows = table.select(SOURCE.names).to_pylist()

        def take(positions: Sequence[int]) -> Iterator[tuple[int, Outcome]]:
            reached = Reachability()
            with self._fetcher() as fetch:
                for position, got in fetch_all([(at, rows[at]["url"]) for at in positions], fetch, self.how):
                    reached.add(rows[position]["url"], got)
                    yield position, Outcome(got.state) if isinstance(got, Fault) else got
            if before is None:  # in a later pass there may well be dead hosts alone
                reached.check(self.how.silent_rows)

        if before is None:
            return pack(action, table, _unfetched(rows), take, store, out, self.spec.format)
        earlier = Earlier.read(store, before)
        settled = earlier.lines(without=self.how.retry_states)
        return pack(action, table, settled, take, store, out, self.spec.format, earlier)

    @contextmanager
    def _fetcher(self) -> Iterator[Callable[[str], Outcome]]:
        """URL → what became of its body; raises the Fault that says why there is none. For many threads."""
        guard = Guard(
            user_agent=user_agent(self.how.contact),
            resolve=self.how.resolve,
            allow=self.how.allow,
            blocks=blocklist(self.spec.block, self.entries).blocks,
        )

        def obey(headers: Message) -> None:
            if opted_out(headers, self.spec.opt_out):
                raise Fault("opt_out")

        with closing(guard), picture_decoder(self.spec, self.how.isolate, self.how.decode_s) as prepare:

            def fetch(url: str) -> Outcome:
                body = guard.fetch(url, max_bytes=self.spec.max_bytes, seconds=self.how.timeout_s, check=obey).body
                picture = prepare(body)  # in the thread that fetched it: decoders let the others run
                return Outcome(picture.state or KEPT, hashlib.sha256(body).digest(), picture)

            yield fetch


@dataclass
class Reachability:
    """Whether any server answered for a shard, and what happened instead."""

    answered: bool = False
    silent: Counter[str] = field(default_factory=Counter)
    """State → rows whose server said nothing."""
    examples: dict[str, str] = field(default_factory=dict)
    """State → the first such row, as "host (what happened)"."""

    def add(self, url: str, got: Outcome | Fault) -> None:
        """Counts a row. A URL that is none (bad_url, refused_scheme) says nothing about the network."""
        if not isinstance(got, Fault) or got.answered:
            self.answered = True
        elif got.state in SILENT:
            self.silent[got.state] += 1
            self.examples.setdefault(got.state, f"{urlsplit(url.strip()).hostname} ({got})")

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


def _unfetched(rows: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Position → line of the index, of the rows that have their state without being fetched."""
    states = (_missing(row) for row in rows)
    return {
        position: {**row, "state": state}
        for position, (row, state) in enumerate(zip(rows, states, strict=True))
        if state
    }


def _missing(row: dict[str, Any]) -> str | None:
    if not (row["url"] or "").strip():
        return "no_url"
    return None if (row["caption"] or "").strip() else "no_caption"


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
