"""Forgotten samples are nowhere in the store and are not fetched again; a command that was killed is finished later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.errors import Refused
from infra.records.forgotten import FORGOTTEN, Forgotten, ForgottenNames, add_request, url_salt
from infra.store.opening import open_store
from pipelines.engine.graph import resolve
from pipelines.engine.versions import reconcile
from pipelines.promote.ledger import view_folder
from pipelines.reports.release import TEMPLATE
from pipelines.versions.forget import forget, names_of
from tests.fixtures.chain import Chain, run, traces
from tests.fixtures.line import put
from tests.fixtures.mortal import Killed, Mortal
from tests.fixtures.stages import Data, download, make, source


@pytest.fixture
def own(chain: Chain, tmp_path: Path) -> Chain:
    return chain.copy(tmp_path / "store")


def row_of(chain: Chain, stage: str = "curate") -> dict[str, Any]:
    """A row that this selection lets stay."""
    stays = chain.stays(stage)
    return next(row for row in chain.index() if row["uid"] in stays)


def named(row: dict[str, Any], by: str) -> ForgottenNames:
    return {
        "url": ForgottenNames(urls=frozenset({row["url"]})),
        "uid": ForgottenNames(uids=frozenset({row["uid"]})),
        "sha256": ForgottenNames(pictures=frozenset({row["sha256"]})),
    }[by]


def listing(chain: Chain) -> set[str]:
    return {entry.name for entry in chain.store.list("")}


@pytest.mark.parametrize("by", ["url", "uid", "sha256"])
def test_nothing_is_left_of_a_sample_but_its_uid(own: Chain, data: Data, by: str) -> None:
    row = row_of(own)
    assert len(traces(own.store, row["uid"])) >= 4  # tar, index, looks, embeddings
    account = forget(own.store, named(row, by))
    assert traces(own.store, row["uid"]) == []
    assert [(one.release, one.name) for one in account.trained] == [(own.release, "unclip")]
    assert all(row["url"].encode() not in own.store.get(name) for name in listing(own) if name.startswith("forgotten/"))
    made = run(own.store, data, own.made["source"])
    stages = (made[stage] for stage in ("source", "download", "filter", "embed", "curate"))
    assert reconcile(*stages)[f"download.{FORGOTTEN}"] == account.samples >= 1
    assert traces(own.store, row["uid"]) == []
    (left,) = (one for one in own.index(made["download"]) if one["uid"] == row["uid"])
    assert {name for name, value in left.items() if value is not None} == {"uid", "state"}


def test_only_the_shards_that_held_it_are_redone(own: Chain, data: Data) -> None:
    account = forget(own.store, named(row_of(own), "uid"))
    assert (account.samples, account.shards) == (1, 1)
    attempts = data.server.attempts.total()
    made = run(own.store, data, own.made["source"])
    assert data.server.attempts.total() == attempts  # nothing was fetched
    for stage in ("download", "embed"):
        before, after = own.made[stage].records, made[stage].records
        assert sum(one.content != other.content for one, other in zip(before, after, strict=True)) == 1


def test_a_rewritten_shard_is_what_a_download_gives_that_obeys_the_list(own: Chain, data: Data, tmp_path: Path) -> None:
    row = row_of(own)
    fresh = open_store(str(tmp_path / "fresh"))
    add_request(fresh, Forgotten.of(named(row, "url"), url_salt(fresh)))
    obeyed = make(fresh, download(data.server.port), make(fresh, source(data.rows)))
    forget(own.store, named(row, "url"))
    rewritten = make(own.store, download(data.server.port), own.made["source"])
    assert rewritten.version == obeyed.version
    assert {record.generation for record in rewritten.records} == {0, 1}


def test_a_picture_is_known_by_its_digest_wherever_it_comes_from(data: Data, chain: Chain, tmp_path: Path) -> None:
    row = row_of(chain)
    fresh = open_store(str(tmp_path / "fresh"))
    add_request(fresh, Forgotten.of(named(row, "sha256"), b""))
    url_salt(fresh)
    rows = pa.table({"url": [row["url"]], "caption": ["another caption of it"]})
    pq.write_table(rows, tmp_path / "list.parquet")
    made = make(fresh, download(data.server.port), make(fresh, source(tmp_path / "list.parquet")))
    assert made.states == {FORGOTTEN: 1}
    (record,) = made.records
    assert record.files["images.tar"].bytes == 10240  # an empty tar


def test_a_dry_run_says_the_same_and_changes_nothing(own: Chain) -> None:
    row, before = row_of(own), listing(own)
    would = forget(own.store, named(row, "url"), dry=True)
    assert listing(own) == before
    assert would == forget(own.store, named(row, "url"))
    assert would.objects >= 4


def test_a_sample_that_no_model_saw_accuses_no_release(own: Chain) -> None:
    kept = own.stays("filter")
    row = next(row for row in own.index() if row["state"] == "kept" and row["uid"] not in kept)
    account = forget(own.store, named(row, "uid"))
    assert (account.samples, account.trained, account.unknown) == (1, [], [])
    assert traces(own.store, row["uid"]) == []


def test_reports_that_show_it_go_and_others_stay(own: Chain) -> None:
    kept = own.stays("filter")
    row = next(row for row in own.index() if row["state"] == "kept" and row["uid"] not in kept)
    assert "<code>{{ row.uid[:12] }}</code></figcaption>" in TEMPLATE.read_text()  # as the pages below have it
    pages = {}
    for uid in (row["uid"], next(iter(kept))):
        page = f"<figure><code>{uid.hex()[:12]}</code></figure>"
        made = put(own.store, "report", lambda out, page=page: (out / "report.html").write_text(page), uid.hex())
        pages[uid] = view_folder(own.store, made.version, list(made.records)) / "report.html"
    forget(own.store, named(row, "uid"))
    assert [page.exists() for page in pages.values()] == [False, True]
    assert len(list(own.store.list("records/report-1/"))) == 1


@pytest.mark.slow
def test_killed_at_any_step_the_same_command_finishes(chain: Chain, data: Data, tmp_path: Path) -> None:
    row = row_of(chain)
    undisturbed = chain.copy(tmp_path / "undisturbed")
    expected = forget(undisturbed.store, named(row, "url"))
    steps = 0
    while True:
        copy = chain.copy(tmp_path / f"killed-{steps}")
        try:
            forget(Mortal(Path(copy.store.uri), steps), named(row, "url"))
            break
        except Killed:
            pass
        # A run between the two does no harm, whatever it finds: what can be read is read, and nothing is lost.
        resolve(download(data.server.port), [copy.made["source"]], copy.store)
        again = forget(copy.store, named(row, "url"))
        assert again.trained == expected.trained
        assert traces(copy.store, row["uid"]) == []
        ours = {name for name in listing(copy) if not name.startswith("forgotten/")}
        theirs = {name for name in listing(undisturbed) if not name.startswith("forgotten/")}
        assert ours == theirs
        steps += 1
    assert steps > 10


def test_what_a_run_committed_meanwhile_is_found_when_the_list_is_applied_again(own: Chain, data: Data) -> None:
    row = row_of(own)
    add_request(own.store, Forgotten.of(named(row, "url"), url_salt(own.store)))  # as if killed right behind this
    account = forget(own.store, ForgottenNames())
    assert account.samples >= 1
    assert traces(own.store, row["uid"]) == []
    assert forget(own.store, ForgottenNames()).samples == 0


def test_in_s3(chain: Chain, s3_uri: str, tmp_path: Path) -> None:
    remote = open_store(s3_uri)
    for entry in chain.store.list(""):
        remote.put_new(entry.name, chain.store.local(entry.name))
    row = row_of(chain)
    would = forget(remote, named(row, "url"), dry=True)
    account = forget(remote, named(row, "url"))
    assert would == account
    assert account == forget(chain.copy(tmp_path / "store").store, named(row, "url"))
    assert traces(remote, row["uid"]) == []


def test_names_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("https://a.test/1.png\n\n" + "ab" * 16 + "\n" + "cd" * 32 + "\n")
    names = names_of(file=path)
    assert names == ForgottenNames(
        frozenset({bytes.fromhex("ab" * 16)}),
        frozenset({"https://a.test/1.png"}),
        frozenset({bytes.fromhex("cd" * 32)}),
    )
    for wrong in ({"urls": ("a.test",)}, {"uids": ("xyz",)}, {"pictures": ("ab" * 16,)}, {"file": tmp_path / "none"}):
        with pytest.raises(Refused, match="--"):
            names_of(**wrong)  # type: ignore[arg-type]
    path.write_text("nonsense\n")
    with pytest.raises(Refused, match="line 1"):
        names_of(file=path)
