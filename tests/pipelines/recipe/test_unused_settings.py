"""Settings of `download` where nothing is fetched, since the pictures come as tars or in a folder."""

from __future__ import annotations

import pytest

from infra.errors import Refused
from pipelines.download.gather import check_unused
from pipelines.recipe import schema as recipes


def section(*changes: str):
    """The section `download` of a recipe that says nothing else there that matters."""
    return recipes.load("laion-art", ["source.urls=null", *changes, "source.tars=a.tar"]).download


@pytest.mark.parametrize(
    "change",
    ["retry_pass=1", "retry_states=[timeout]", "block=[ads.test]", "block_file=block.txt", "opt_out=[noai]"],
)
def test_those_that_decide_about_rows_are_refused(change):
    name = change.partition("=")[0]
    with pytest.raises(Refused, match=rf"download\.{name} means nothing with source\.tars.*leave it out"):
        check_unused(section(f"download.{change}"), "source.tars")


@pytest.mark.parametrize(
    "change",
    [
        "timeout_s=7",
        "per_host=2",
        "retries=9",
        "backoff_s=2.5",
        "retry_after_s=3",
        "give_up=9",
        "silent_rows=0",
        "contact=me@here.test",
        "allow=[10.0.0.0/8]",
        "resolve={a.test: 10.0.0.1}",
    ],
)
def test_those_that_only_say_how_to_fetch_are_told(change, caplog):
    name = change.partition("=")[0]
    check_unused(section(f"download.{change}"), "source.folder")
    assert f"download.{name}: no effect with source.folder" in caplog.text


def test_what_matters_and_what_is_at_its_default_is_not_told(caplog):
    check_unused(
        section(
            "download.size=64",
            "download.threads=3",
            "download.cpus=2",
            "download.isolate=true",
            "download.retry_pass=0",
        ),
        "source.tars",
    )
    assert not caplog.records


def test_a_run_is_refused_before_anything_is_read_twice(tmp_path):
    from pipelines.run import prepared
    from tests.fixtures.samples import plain, write_tar

    tar = write_tar(tmp_path / "a.tar", plain(range(3)))
    changes = [f"source.tars={tar}", "download.retry_pass=1"]
    with (
        pytest.raises(Refused, match=r"Recipe tiny: download\.retry_pass means nothing with source\.tars"),
        prepared("tiny", str(tmp_path / "store"), changes, create=True),
    ):
        pass
