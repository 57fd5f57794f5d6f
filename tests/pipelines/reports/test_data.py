"""The page about the data: its numbers against an independent count, its text harmless, its pictures a fair choice."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.records.commits import commit
from infra.records.manifest import Action, Manifest, Record
from infra.records.objects import object_name
from infra.records.schemas import INDEX, KEPT, pair_uid
from infra.store.base import Store
from infra.store.opening import open_store
from pipelines.engine.versions import find_version
from pipelines.reports import contact
from pipelines.reports import data as data_report
from pipelines.reports.census import Row, count_dataset
from pipelines.reports.data import DataReport, contents, lineage, write
from pipelines.reports.page import render
from pipelines.stage import plain
from pipelines.versions.forget import forget, names_of
from tests.fixtures.chain import CURATE, Chain
from tests.fixtures.samples import picture
from tests.fixtures.stages import RULES, make
from tests.pipelines.cli.test_main import Run, refused, unclip  # noqa: F401  a fixture
from tests.pipelines.reports.test_release import Text

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def rules() -> dict[str, Any]:
    return {"filter": plain(RULES), "curate": plain(CURATE)}


@pytest.fixture(scope="module")
def page(chain: Chain) -> dict[str, Any]:
    """What the page about the chain's data says."""
    made, said = lineage(chain.store, find_version(chain.store, chain.made["curate"].version))
    assert said == rules()
    assert {name: one.version for name, one in made.items()} == {
        name: one.version for name, one in chain.made.items() if name != "clip"
    }
    return contents(chain.store, made, said)


@pytest.fixture(scope="module")
def html(page: dict[str, Any]) -> str:
    return render(data_report.TEMPLATE, page)


def rows_of(chain: Chain) -> list[dict[str, Any]]:
    """Every row of the index with the rule that took it and its score: read plainly, and joined by hand."""
    rules: dict[bytes, str | None] = {}
    for group in ("filter", "curate"):
        for file in chain.made[group].only.files.values():
            for row in pq.read_table(chain.store.local(object_name(file.sha256))).to_pylist():
                rules[row["uid"]] = row["rule"] and f"{group}.{row['rule']}"
    scores = {}
    for record in chain.made["embed"].records:
        for row in pq.read_table(chain.store.local(object_name(record.sha("rows.parquet")))).to_pylist():
            scores[row["uid"]] = row["score"]
    return [{**row, "rule": rules.get(row["uid"]), "score": scores.get(row["uid"])} for row in chain.index()]


def test_every_number_is_what_an_independent_count_of_the_store_gives(chain: Chain, page: dict[str, Any]) -> None:
    rows = rows_of(chain)
    kept = [row for row in rows if row["state"] == KEPT]
    assert page["listed"] == len(rows)
    reasons = Counter(row["state"] for row in rows if row["state"] != KEPT)
    assert {one["state"]: one["count"] for one in page["reasons"] if one["stage"] == "download"} == reasons
    taken = Counter(row["rule"] for row in kept if row["rule"])
    assert {f"{one['group']}.{one['rule']}": one["count"] for one in page["rules"] if one["count"]} == taken
    hosts = Counter(urlsplit(row["url"]).hostname for row in rows)
    good = Counter(urlsplit(row["url"]).hostname for row in kept)
    named = {one["host"]: (one["rows"], one["kept"]) for one in page["hosts"]["largest"]}
    assert page["hosts"]["count"] == len(hosts)
    assert named == {host: (number, good[host]) for host, number in hosts.most_common(data_report.HOSTS)}
    left = [one["left"] for one in page["steps"]]
    assert left[0] == len(rows)
    assert left[-1] == sum(row["rule"] is None for row in kept) == page["cards"][-1]["rows"]


def test_the_histograms_count_every_row_once(chain: Chain) -> None:
    counted = count_dataset(chain.store, chain.made)
    rows = [row for row in rows_of(chain) if row["state"] == KEPT]
    for stays in (True, False):
        mine = [row for row in rows if (row["rule"] is None) == stays]
        at = 0 if stays else 1
        assert counts(counted.characters[at]) == Counter(len(row["caption"]) for row in mine)
        assert counts(counted.words[at]) == Counter(len(row["caption"].split()) for row in mine)
        assert counts(counted.sides[at]) == Counter(min(row["width"], row["height"]) for row in mine)
        assert counted.aspects[at].sum() == len(mine)
        scored = [row["score"] for row in mine if row["score"] is not None]
        expected, _ = np.histogram(scored, bins=counted.scores.shape[1], range=(-1, 1))
        assert (counted.scores[at] == expected).all()


def counts(bins: np.ndarray) -> dict[int, int]:
    return {at: int(number) for at, number in enumerate(bins) if number}


def test_duplicates_lie_beside_what_they_are_duplicates_of(chain: Chain, page: dict[str, Any]) -> None:
    digests = {row["uid"].hex()[:12]: row["sha256"] for row in chain.index() if row["sha256"]}
    (duplicates,) = page["duplicates"]
    assert duplicates["rule"] == "exact_duplicates"
    assert duplicates["groups"]
    for group in duplicates["groups"]:
        names = [one["uid"] for one in (*group["taken"], *group["others"])]
        assert len(names) == len(set(names)) > 1
        assert len({digests[name] for name in names}) == 1
        assert group["alike"] == sum(digest == digests[names[0]] for digest in digests.values())


def test_the_sheets_show_what_stays_and_what_goes_with_the_rule_that_took_it(
    chain: Chain, page: dict[str, Any]
) -> None:
    rules = {row["uid"].hex()[:12]: row["rule"] for row in rows_of(chain) if row["state"] == KEPT}
    for one in page["sheets"]["kept"]:
        assert rules[one["uid"]] is None
        assert one["uri"].startswith("data:image/jpeg;base64,")
    assert page["sheets"]["rejected"]
    for one in page["sheets"]["rejected"]:
        assert rules[one["uid"]] == one["why"]
    stays = sorted(int.from_bytes(one[8:], "big") for one in chain.stays("curate"))
    shown = [one["uid"] for one in page["sheets"]["kept"]]
    lowest = {
        one.hex()[:12] for one in chain.stays("curate") if int.from_bytes(one[8:], "big") <= stays[len(shown) - 1]
    }
    assert set(shown) == lowest


def test_what_is_not_to_be_seen_is_not_shown_whatever_it_is_a_duplicate_of(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = {row["uid"]: row["rule"] for row in rows_of(chain)}
    every = [Row(0, number, uid) for uid, number in places(chain).items()]
    rows = [row for row in every if rules[row.uid]] + [row for row in every if not rules[row.uid]][:10]
    shown = contact.sheet_rows(chain.store, chain.made, rows)
    assert all(one.uri for one in shown.values())
    monkeypatch.setattr(contact, "UNSEEN", frozenset({"exact_duplicates", "clip_score"}))
    hidden = {uid for uid, one in contact.sheet_rows(chain.store, chain.made, rows).items() if one.uri is None}
    assert hidden == {row.uid for row in rows if (rules[row.uid] or "").endswith(("exact_duplicates", "clip_score"))}
    assert hidden


def places(chain: Chain) -> dict[bytes, int]:
    """uid → number of its shard, of the rows that were downloaded."""
    return {
        row["uid"]: number
        for number, record in enumerate(chain.made["download"].records)
        for row in pq.read_table(chain.store.local(object_name(record.sha("index.parquet")))).to_pylist()
        if row["state"] == KEPT
    }


@pytest.mark.slow
def test_a_browser_shows_every_section(html: str, tmp_path: Path) -> None:
    dom = browsed(html, tmp_path)
    heads = re.findall(r'<h2 id="(\w+)"', dom)
    assert heads == ["steps", "reasons", "hosts", "charts", "rules", "duplicates", "kept", "rejected", "versions"]
    assert dom.count("<svg") == 5
    assert dom.count("<rect") > 50


def test_the_page_is_whole_in_itself_and_says_the_same_for_the_same_data(chain: Chain, html: str) -> None:
    read = Text(html)
    assert read.open == []
    assert {value[:1] if value[:1] == "#" else value.partition(",")[0] for value in read.loads} == {
        "#",
        "data:image/jpeg;base64",
    }
    assert "url(" not in html
    assert chain.store.uri not in html
    made, said = lineage(chain.store, find_version(chain.store, chain.made["curate"].version))
    assert render(data_report.TEMPLATE, contents(chain.store, made, said, partial(count_dataset, threads=2))) == html


@pytest.mark.slow
def test_the_page_about_data_in_s3_is_the_same(chain: Chain, html: str, s3_uri: str, tmp_path: Path) -> None:
    there = open_store(s3_uri, cache=tmp_path / "cache")
    for entry in chain.store.list(""):
        there.put_new(entry.name, chain.store.local(entry.name))
    out, _ = write(there, chain.made["curate"].version, tmp_path / "s3.html")
    assert out.read_text(encoding="utf-8") == html


HOSTILE = (
    "</figcaption><script>document.title='owned'</script>",
    '"><img src="{}/caption.png" onerror="document.title=\'owned\'">',
    "<style>@import '{}/style.css';</style>",
    "' onmouseover='document.title=1 {{{{ 7 * 7 }}}} {{% for x in y %}}",
    "a\u202ereversed\x00 <b>bold</b> &amp; \ud7ff",
)


def hostile(store: Store, leak: str) -> Manifest:
    """A download of pictures whose captions and addresses want to be more than text."""
    captions = [text.format(leak) for text in HOSTILE]
    urls = [f"http://<script>document.title='owned'<{number}>.test/{leak}/x.png" for number in range(len(captions))]
    urls[0] = f'http://"><img src={leak}/host.png>/x.png'
    body = picture(0)

    def make(out: Path) -> None:
        rows = [
            {
                "uid": pair_uid(url, caption), "url": url, "caption": caption, "state": KEPT, "offset": 0,
                "length": len(body), "width": 40, "height": 40, "sha256": bytes(32),
            }
            for url, caption in zip(urls, captions, strict=True)
        ]  # fmt: skip
        rows.append({"uid": bytes(16), "url": urls[0], "caption": captions[0], "state": f"<img src={leak}/state.png>"})
        (out / "images.tar").write_bytes(body)
        pq.write_table(pa.Table.from_pylist(rows, schema=INDEX), out / "index.parquet")

    action = Action("download/1", {}, ())
    with store.scratch() as out:
        make(out)
        states = {KEPT: len(captions), f"<img src={leak}/state.png>": 1}
        manifest = Manifest(action, (commit(store, action, Record.of(action, out, states=states), out),))
    manifest.save(store)
    return manifest


@pytest.fixture
def leak() -> Iterator[tuple[str, list[str]]]:
    """A web server that a page must not ask, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *words: Any) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.slow
def test_in_a_browser_what_strangers_wrote_is_text_and_asks_nobody(tmp_path: Path, leak: tuple[str, list[str]]) -> None:
    uri, asked = leak
    store = open_store(str(tmp_path / "store"))
    version = hostile(store, uri).version
    out, about = write(store, version[:12], tmp_path / "data.html")
    assert about.version == version
    dom = browsed(out.read_text(encoding="utf-8"), tmp_path)
    assert f"<title>Data {version[:12]}</title>" in dom
    assert asked == []
    assert "<script" not in dom
    assert dom.count("<img") == len(HOSTILE) == dom.count('src="data:image/jpeg')
    assert "{{ 7 * 7 }}" in dom
    # The browser would load them, were they more than text:
    assert browsed(f'<title>x</title><img src="{uri}/live.png">', tmp_path)
    assert asked == ["/live.png"]


def browsed(page: str, folder: Path) -> str:
    """The document as a real browser holds it once the page is loaded and its scripts have run."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    (folder / "page.html").write_text(page, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    address = (folder / "page.html").as_uri()
    ran = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def test_the_page_goes_as_far_as_the_data(chain: Chain, tmp_path: Path) -> None:
    for stage, sections in (("download", 6), ("filter", 9), ("embed", 9)):
        out, about = write(chain.store, chain.made[stage].version, tmp_path / f"{stage}.html")
        assert about.stage == f"{stage}/1"
        text = out.read_text(encoding="utf-8")
        assert len(re.findall(r"<h2 id=", text)) == sections
        assert ("CLIP score" in text) == (stage == "embed")


def test_a_person_asks_for_the_newest_data_for_a_version_or_for_a_releases_data(
    unclip: Run,  # noqa: F811
    chain: Chain,
    tmp_path: Path,
) -> None:
    own = chain.copy(tmp_path / "store")
    version = own.made["curate"].version
    assert f"wrote data.html, about {version[:12]} of curate/1" in unclip("data", "report")[1]
    newest = (tmp_path / "data.html").read_bytes()
    for ref in (version[:10], own.release[:10]):
        assert unclip("data", "report", ref, "--out", "deep/other.html")[0] == 0
        assert (tmp_path / "deep" / "other.html").read_bytes() == newest
    refused(unclip("data", "report", "zz"), "no version 'zz'")
    refused(unclip("data", "report", own.made["source"].version[:12]), "nothing to be seen yet")
    refused(unclip("data", "report", "--store", "elsewhere"), "there is no data in", "unclip run RECIPE --until curate")


def test_the_stage_makes_the_same_page_and_forgetting_takes_it_away(chain: Chain, html: str, tmp_path: Path) -> None:
    own = chain.copy(tmp_path / "store")
    stage = DataReport(rules())
    made = make(own.store, stage, *(own.made[need] for need in stage.needs))
    name = object_name(made.only.sha(data_report.PAGE))
    assert own.store.get(name).decode() == html
    unseen = next(one for one in own.stays("curate") if one.hex()[:12] not in html)
    forget(own.store, names_of(uids=(unseen.hex(),)))
    assert own.store.exists(name)
    seen = next(one for one in own.stays("curate") if one.hex()[:12] in html)
    forget(own.store, names_of(uids=(seen.hex(),)))
    assert not own.store.exists(name)
