"""`unclip data …`: what a person reads, and the exit codes that a program reads."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from infra.records.objects import object_name
from infra.store.local import LocalStore
from infra.store.opening import open_store
from tests.fixtures.chain import Chain
from tests.pipelines.cli.test_main import Run, refused, unclip  # noqa: F401  a fixture
from tests.pipelines.versions.test_verify import done


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """The store that `unclip` uses."""
    opened = open_store(str(tmp_path / "store"))
    assert isinstance(opened, LocalStore)
    return opened


def said(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert code == 0, err
    return out


def test_verify_says_what_is_wrong_exits_with_5_and_mends(unclip: Run, store: LocalStore) -> None:  # noqa: F811
    made, _ = done(store)
    assert "all is whole" in said(unclip("data", "verify"))
    name = object_name(made[1].records[0].sha("n.json"))
    store.delete(name)
    result = unclip("data", "verify")
    refused(result, "1 of them are missing or damaged", code=5)
    assert f"missing {name} double/1 {made[1].version[:12]}: n.json of shard 0" in " ".join(result[1].split())
    assert "--mend" in result[1]
    code, out, _ = unclip("data", "verify", made[1].version[:8], "--json")
    assert (code, json.loads(out)["findings"][0]["name"]) == (5, name)
    assert "Mended 1; the next run does again: 1 of double-1" in said(unclip("data", "verify", "--mend"))
    assert "marked to be made anew: all is whole" in said(unclip("data", "verify"))
    done(store)
    assert "marked" not in said(unclip("data", "verify"))
    refused(unclip("data", "verify", "zz"), "no version 'zz'", "unclip data ls")


def test_gc_only_says_what_can_go_until_it_is_told_to(unclip: Run, store: LocalStore) -> None:  # noqa: F811
    done(store)
    name = object_name("ab" * 32)
    store.put_new(name, b"of a killed run")
    assert "0 files, 0 B can go. 1 more" in said(unclip("data", "gc"))
    long_ago = time.time() - 30 * 3600
    os.utime(store.local(name), (long_ago, long_ago))
    assert "1 objects, 15 B\n1 files, 15 B can go. To remove them: the same with --delete" in said(unclip("data", "gc"))
    assert store.exists(name)
    assert "0 files" in said(unclip("data", "gc", "--older-than", 48))
    assert "removed 1 files, 15 B." in said(unclip("data", "gc", "--delete"))
    assert not store.exists(name)
    refused(unclip("data", "gc", "--keep", "some"), "--keep 'some'", "all, newest")
    refused(unclip("data", "gc", "--older-than", "-1"), "--older-than is -1")


def test_forget_says_what_it_would_do_and_does_it(
    unclip: Run,  # noqa: F811
    chain: Chain,
    tmp_path: Path,
) -> None:
    own = chain.copy(tmp_path / "store")
    uid = next(iter(own.stays("curate"))).hex()
    trained = f"trained on 1 of them: release {own.release[:12]} of unclip"
    would = said(unclip("data", "forget", "--uid", uid, "--dry-run"))
    assert would.startswith("1 rows would be forgotten: 1 shards would be written anew")
    assert trained in would
    assert said(unclip("data", "forget", "--uid", uid)) == would.replace("would be", "were")
    assert "objects are gone with forgotten samples: all is whole" in said(unclip("data", "verify"))
    again = said(unclip("data", "forget", "--uid", uid))
    assert again.startswith("0 rows were forgotten")
    assert trained in again
    refused(unclip("data", "forget", "--url", "a.test/1.png"), "--url 'a.test/1.png' is no URL")


def test_diff_says_what_changed_and_writes_the_rows(unclip: Run, chain: Chain, tmp_path: Path) -> None:  # noqa: F811
    own = chain.copy(tmp_path / "store")
    a, b = own.made["filter"].version, own.made["curate"].version
    refused(unclip("data", "diff", a[:12], b[:12]), "compare two of the same stage")
    assert said(unclip("data", "diff", a[:12], a[:12], "--rows", "rows.parquet")).endswith(": the same\n")
    assert pq.read_table(tmp_path / "rows.parquet").num_rows == 0
    parts = json.loads(said(unclip("data", "diff", own.release, own.release, "--json")))
    assert {part["stage"] for part in parts} == set(own.made)
