"""A release from its bundle over gate and ledger to a folder that loads; and what happens to it by hand."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest

from infra.errors import Refused
from infra.ledger import Ledger
from infra.records.commits import commit
from infra.records.folders import materialise
from infra.records.manifest import Action, Manifest, Record
from infra.records.objects import object_name
from infra.store.local import LocalStore
from infra.store.opening import open_store
from pipelines.promote import ledger as releases
from pipelines.promote.gate import Gate, GateSpec
from pipelines.promote.promote import Promote
from pipelines.release.bundle import Bundle, BundleSpec
from pipelines.release.open import find_release, open_release
from tests.fixtures.line import MODELS, SAMPLING_SECTION, Line
from tests.fixtures.stages import make, todo

GOOD, BETTER, WORSE = [True] * 90 + [False] * 10, [True] * 97 + [False] * 3, [True] * 70 + [False] * 30


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """A line whose models are there and that has no release yet."""
    folder = tmp_path_factory.mktemp("line")
    return Line(open_store(str(folder / "store")), folder)


@pytest.fixture
def line(trained: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Line:
    """That line in a store of one's own, whose caches and MLflow are nobody else's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody answers there: the ledger must do alone
    shutil.copytree(trained.store.uri, tmp_path / "store", copy_function=os.link)
    copy = Line.__new__(Line)
    copy.__dict__.update(trained.__dict__, store=open_store(str(tmp_path / "store")), made=dict(trained.made))
    return copy


def test_the_first_release_becomes_champion_and_loads(line: Line) -> None:
    from unclip.release.folder import check_release

    made = line.judge(line.release(GOOD))
    assert line.head is not None
    assert (line.head.release, line.head.gate) == (made["bundle"].version, made["gate"].only.key)
    folder = open_release(line.store, "champion")
    said = check_release(folder)
    assert said.name == "unclip"
    assert said.data == {name: line.made[name].version for name in ("clip", *MODELS, *said.data) if name in line.made}
    assert (
        open_release(line.store, "unclip@champion") == open_release(line.store, made["bundle"].version[:10]) == folder
    )
    assert open_release(line.store, str(folder)) == folder


def test_a_champion_run_again_has_nothing_to_do(line: Line) -> None:
    release = line.release(GOOD)
    made = line.judge(release)
    for steps in (4, 5):
        gate, promote = line.stages()
        assert todo(line.store, gate, release["evaluate"], release["bundle"]) == 0
        assert todo(line.store, promote, made["gate"], release["evaluate"], release["bundle"]) == 0
        line.judge(line.release(BETTER, steps=steps))
        releases.rollback(line.store, "unclip", "for the test")
    assert line.head is not None
    assert line.head.release == release["bundle"].version


def test_a_better_release_follows_and_a_worse_one_is_refused(line: Line) -> None:
    first = line.judge(line.release(GOOD))
    second = line.judge(line.release(BETTER, steps=4))
    verdict = json.loads(line.store.get(object_name(second["gate"].only.sha("verdict.json"))))
    assert verdict["champion"] == first["bundle"].version
    assert verdict["comparison"]["single"]["all"] == pytest.approx(0.07)
    head = line.head
    with pytest.raises(Refused, match=r"single.all is worse than the champion's by 0\.270") as refused:
        line.judge(line.release(WORSE, steps=5))
    assert refused.value.code == 3
    assert line.head == head


def test_a_release_below_a_minimum_is_refused_by_name(line: Line) -> None:
    with pytest.raises(Refused, match=r"single.all is 0\.900 and must be at least 0\.95 .* no champion yet") as refused:
        line.judge(line.release(GOOD), GateSpec({"single.all": 0.95}))
    assert refused.value.code == 3
    with pytest.raises(Refused, match=r"gate.minimum names 'single\.al'.*single\.all") as refused:
        line.judge(line.release(GOOD), GateSpec({"single.al": 0.95}))
    assert refused.value.code == 2
    line.judge(line.release(GOOD), GateSpec({"single.all": 0.9, "single.colour": 1.0}))


def test_a_fall_within_chance_is_no_fall(line: Line) -> None:
    line.judge(line.release([True] * 8))
    line.judge(line.release([True] * 7 + [False], steps=4))


def test_scores_on_other_prompts_are_not_compared_and_the_verdict_says_so(line: Line) -> None:
    line.judge(line.release(GOOD))
    made = line.judge(line.release(WORSE, sort="other", steps=4))
    verdict = json.loads(line.store.get(object_name(made["gate"].only.sha("verdict.json"))))
    assert verdict["comparison"] == {}
    assert "different prompts" in verdict["note"]


def test_a_promotion_judged_against_a_head_that_has_moved_is_refused(line: Line) -> None:
    line.judge(line.release(GOOD))
    release = line.release(BETTER, steps=4)
    gate, promote = line.stages()
    verdict = make(line.store, gate, release["evaluate"], release["bundle"])
    line.judge(line.release(BETTER, steps=5))
    with pytest.raises(Refused, match="has moved on") as refused:
        make(line.store, promote, verdict, release["evaluate"], release["bundle"])
    assert refused.value.code == 4


def test_a_promotion_killed_before_its_record_is_not_entered_twice(line: Line) -> None:
    release = line.release(GOOD)
    made = line.judge(release)
    (record,) = line.store.list("records/promote-1/")
    line.store.delete(record.name)
    assert line.judge(release)["promote"].version == made["promote"].version
    assert Ledger(line.store, "unclip").verify() == 1


def test_two_runs_that_promote_the_same_release_enter_it_once(line: Line) -> None:
    release = line.release(GOOD)
    gate, promote = line.stages()
    verdict = make(line.store, gate, release["evaluate"], release["bundle"])
    line.judge(release)
    (action,) = promote.actions(verdict, release["evaluate"], release["bundle"])
    with line.store.scratch() as out:
        assert promote.run(action, line.store, out).facts["number"] == 1
    assert Ledger(line.store, "unclip").verify() == 1


def test_a_rollback_brings_the_one_before_and_no_run_brings_the_other_back(line: Line) -> None:
    first, second = line.release(GOOD), line.release(BETTER, steps=4)
    line.judge(first)
    with pytest.raises(Refused, match="no champion to roll back to"):
        releases.rollback(line.store, "unclip", "")
    line.judge(second)
    assert "again" in releases.rollback(line.store, "unclip", "grey pictures")
    assert find_release(line.store, "champion") == first["bundle"].version
    with pytest.raises(Refused, match=r"was rolled back .*entry 3: grey pictures") as refused:
        line.judge(second)
    assert refused.value.code == 3
    releases.promote(line.store, "unclip", second["bundle"].version[:8], "they were not grey")
    assert find_release(line.store, "champion") == second["bundle"].version
    line.judge(second)
    releases.rollback(line.store, "unclip", "they were")
    assert find_release(line.store, "champion") == first["bundle"].version
    kinds = [entry.kind for entry in Ledger(line.store, "unclip").entries()]
    assert kinds == ["promote", "promote", "rollback", "promote", "rollback"]


def test_a_release_that_failed_the_gate_can_be_promoted_by_hand_and_stays(line: Line) -> None:
    line.judge(line.release(GOOD))
    worse = line.release(WORSE, steps=4)
    said = releases.promote(line.store, "unclip", worse["bundle"].version, "the test set was wrong")
    assert "is the champion of unclip (entry 2)" in said
    assert "already" in releases.promote(line.store, "unclip", worse["bundle"].version, "again")
    assert line.head is not None
    assert line.head.facts["evaluate"] == worse["evaluate"].version
    line.judge(worse)  # the champion is not refused for being what it is
    assert Ledger(line.store, "unclip").verify() == 2


def test_names_that_mean_no_release_or_several_are_refused(line: Line) -> None:
    with pytest.raises(Refused, match="'unclip' has no champion yet"):
        open_release(line.store, "champion")
    with pytest.raises(Refused, match="'other' has no champion yet"):
        open_release(line.store, "other@champion")
    with pytest.raises(Refused, match="names no release"):
        open_release(line.store, "nonsense")
    version = line.release(GOOD)["bundle"].version
    with pytest.raises(Refused, match=f"no release begins with 00000000 .*{version[:12]}"):
        open_release(line.store, "00000000")
    line.name = "landscapes"
    line.judge(line.release(GOOD))
    assert find_release(line.store, "champion") == find_release(
        line.store, "landscapes@champion"
    )  # the only line that there is
    assert line.head is not None
    for name in ("portraits", "cars"):
        Ledger(line.store, name).append(line.head, None)
    with pytest.raises(Refused, match=r"several model lines.*cars, landscapes, portraits"):
        find_release(line.store, "champion")


def test_verify_finds_a_changed_byte_and_a_missing_file(line: Line) -> None:
    with pytest.raises(Refused, match="no release of 'unclip' was promoted"):
        releases.verify(line.store, "unclip")
    made = line.judge(line.release(GOOD))
    assert "1 ledger entries are chained" in releases.verify(line.store, "unclip")
    assert isinstance(line.store, LocalStore)
    weights = line.store.root / object_name(made["bundle"].only.sha("release.json"))
    whole = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(whole.replace(b"unclip", b"UNCLIP"))
    with pytest.raises(Refused, match="was altered") as refused:
        releases.verify(line.store, "unclip")
    assert refused.value.code == 5
    weights.unlink()
    with pytest.raises(Refused, match="is incomplete"):
        releases.verify(line.store, "unclip")


def test_the_table_and_the_document_of_a_release_say_what_it_is(line: Line) -> None:
    from rich.console import Console

    made = line.judge(line.release(GOOD))
    written = io.StringIO()
    Console(width=200, file=written).print(releases.table(line.store, "unclip"))
    text = written.getvalue()
    assert "promote" in text
    assert made["bundle"].version[:12] in text
    assert "single.all 0.900" in text
    shown = releases.show(line.store, "champion")
    assert shown["version"] == made["bundle"].version
    assert shown["evaluate"] == made["evaluate"].version
    assert shown["scores"]["single.all"] == 0.9
    assert [(entry["ledger"], entry["number"], entry["champion"]) for entry in shown["ledger"]] == [("unclip", 1, True)]


def test_a_bundle_of_models_that_do_not_fit_is_refused(line: Line) -> None:
    stage = Bundle(BundleSpec("unclip", SAMPLING_SECTION), tuple(name for name in MODELS if name != "upsampler-32"))
    with pytest.raises(ValueError, match="upsampler"):
        make(line.store, stage, *(line.made[need] for need in stage.needs))


def test_the_same_models_make_the_same_release(line: Line, tmp_path: Path) -> None:
    stage = Bundle(BundleSpec("unclip", SAMPLING_SECTION), MODELS)
    inputs = [line.made[need] for need in stage.needs]
    first = make(line.store, stage, *inputs)
    line.store.delete(next(iter(line.store.list("records/bundle-1/"))).name)
    assert make(line.store, stage, *inputs).version == first.version
    assert Manifest.load(line.store, first.version).only.files.keys() > {"release.json", "clip/merges.txt"}


def test_an_impossible_tolerance_is_refused() -> None:
    with pytest.raises(Refused, match=r"gate\.tolerance is 2"):
        GateSpec(tolerance=2)
    assert Gate(GateSpec(), None).needs == ("evaluate", "bundle")
    assert Promote("unclip", None).spec == {"name": "unclip"}


def test_a_line_in_s3_ends_in_a_folder_that_loads(s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unclip.release.folder import check_release

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    line = Line(open_store(s3_uri), tmp_path)
    made = line.judge(line.release(GOOD))
    made["report"] = line.report(made)
    assert check_release(open_release(line.store, "champion")).name == "unclip"
    assert "are whole" in releases.verify(line.store, "unclip")
    said = "\n".join(releases.summary(line.store, "unclip", made, s3_uri, "http://127.0.0.1:9"))
    assert f"--store {s3_uri}" in said
    assert "report.html" in said


def test_damaged_weights_are_not_bundled(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    action = Action("decoder/1", {}, ())
    with store.scratch() as scratch:
        (scratch / "model.safetensors").write_bytes(b"weights")
        record = commit(store, action, Record.of(action, scratch), scratch)
    assert (materialise(store, record, tmp_path / "whole") / "model.safetensors").read_bytes() == b"weights"
    damaged = tmp_path / "store" / object_name(record.sha("model.safetensors"))
    damaged.chmod(0o644)
    damaged.write_bytes(b"weighty")
    with pytest.raises(Refused, match=r"model.safetensors\) in the store is damaged") as caught:
        materialise(store, record, tmp_path / "damaged")
    assert caught.value.code == 5
