"""Scores by hand: what is counted, what stays null, and what may be compared."""

from __future__ import annotations

import copy
import json
import math

import pytest

from infra.documents import canonical
from infra.errors import Refused
from pipelines.evaluate.scores import check_name, compare, flat, read, score
from unclip.metrics import cmmd, coverage, frechet, mcnemar, wilson


def row(number: int, kind: str = "single", right: bool = True, **changes):
    return {
        "prompt": f"prompt {number}",
        "kind": kind,
        "seed": number,
        "verdict": json.dumps({"colour": True, "shape": right, "all": right}),
        "floor_verdict": json.dumps({"colour": False, "shape": False, "all": False}),
        "true_verdict": json.dumps({"colour": True, "shape": True, "all": True}),
        "zero_shot": json.dumps({"colour": right}) if number % 2 else None,
        "clip_score": 0.25 + 0.5 * right,
        "embedding": [1.0, 0.0],
        "true_embedding": [0.0, 2.0],
        **changes,
    }


def apart(number: int):
    """Embeddings of length 1, all different."""
    return {"embedding": [math.cos(number), math.sin(number)], "true_embedding": [math.cos(2 * number), 0.5]}


ROWS = [row(0), row(1, right=False), row(2), row(3), row(4, "pair", right=False)]


def test_rates_are_counted_by_kind_and_attribute():
    scores = score(ROWS, "abc")
    single = scores["kinds"]["single"]
    assert single["count"] == 4
    assert single["attributes"]["shape"] == {**wilson(3, 4)._asdict(), "count": 4}
    assert single["attributes"]["colour"]["value"] == 1
    assert single["ceiling"]["all"]["value"] == 1
    assert single["floor"]["all"]["value"] == 0
    assert single["zero_shot"]["colour"] == {**wilson(1, 2)._asdict(), "count": 2}
    assert scores["kinds"]["pair"]["attributes"]["all"]["value"] == 0
    assert scores["kinds"]["pair"]["zero_shot"] is None
    assert single["clip_score"] == pytest.approx(0.625)
    assert scores["clip_score"] == pytest.approx(0.55)
    assert scores["cmmd"] == pytest.approx(cmmd([[1, 0]] * 5, [[0, 2]] * 5))


def test_verdicts_stay_in_the_order_of_the_prompts():
    items = score(ROWS, "abc")["items"]
    assert items["all"] == [True, False, True, True, False]
    assert items["prompt"] == [f"prompt {n}" for n in range(5)]
    assert items["kind"] == ["single"] * 4 + ["pair"]


def test_what_was_not_measured_is_null_and_no_metric():
    names = ("verdict", "floor_verdict", "true_verdict", "zero_shot", "true_embedding")
    scores = score([row(0, **dict.fromkeys(names))], "abc")
    part = scores["kinds"]["single"]
    unmeasured = ("attributes", "ceiling", "floor", "zero_shot", "cmmd", "fd", "precision", "recall")
    assert [part[name] for name in unmeasured] == [None] * 8
    assert scores["items"]["all"] == [None]
    assert flat(scores) == {"clip_score": 0.75, "single.clip_score": 0.75}


def test_fd_and_recall_compare_the_embeddings_of_all_pictures_and_of_a_kind():
    rows = [row(number, "single" if number < 6 else "pair", **apart(number)) for number in range(9)]
    scores = score(rows, "abc")
    drawn, true = [one["embedding"] for one in rows], [one["true_embedding"] for one in rows]
    assert scores["fd"] == frechet(drawn, true)
    assert (scores["precision"], scores["recall"]) == coverage(drawn, true, 3)
    single, pair = scores["kinds"]["single"], scores["kinds"]["pair"]
    assert single["fd"] == frechet(drawn[:6], true[:6])
    assert single["recall"] == coverage(drawn[:6], true[:6], 3).recall
    # Three pictures have a covariance, but no third neighbour.
    assert (pair["fd"], pair["precision"], pair["recall"]) == (frechet(drawn[6:], true[6:]), None, None)
    assert {"fd", "precision", "recall", "single.recall", "pair.fd"} < set(flat(scores))


def test_the_first_documents_which_had_no_fd_are_still_read():
    older = score(ROWS, "abc")
    for part in (older, *older["kinds"].values()):
        for name in ("fd", "precision", "recall"):
            del part[name]
    assert read(canonical(older)) == older
    assert flat(older)["cmmd"] == older["cmmd"]
    assert "fd" not in flat(older)


def test_every_measured_score_is_a_name_for_the_gate():
    rows = [row(number, "single" if number < 6 else "pair", **apart(number)) for number in range(12)]
    kinds = ["single", "pair"]
    for name in flat(score(rows, "abc")):
        check_name(name, kinds, judge=True, reference=True)
    for name in ("recall", "pair.fd"):
        with pytest.raises(Refused, match=r"evaluate\.reference names none"):
            check_name(name, kinds, judge=True, reference=False)
    with pytest.raises(Refused, match=r"no evaluation gives a score 'fid'; there are clip_score, cmmd, fd, precision"):
        check_name("fid", kinds, judge=True, reference=True)


def test_metrics_have_dotted_names():
    metrics = flat(score(ROWS, "abc"))
    assert metrics["single.all"] == 0.75
    assert metrics["single.all.low"] == wilson(3, 4).low
    assert metrics["single.ceiling.shape"] == 1
    assert metrics["pair.all"] == 0
    assert all(isinstance(value, float) for value in metrics.values())


def test_scores_survive_the_store_and_other_schemas_are_refused():
    scores = score(ROWS, "abc")
    assert read(canonical(scores)) == scores
    with pytest.raises(Refused, match="schema version 5"):
        read(canonical(scores | {"schema_version": 5}))


def test_two_releases_are_compared_prompt_by_prompt():
    old = score(ROWS, "old")
    new = score([row(0, right=False), row(1), row(2), row(3), row(4, "pair")], "new")
    found = compare(new, old)
    assert found["single"]["all"] == 0
    assert found["single"]["all.p"] == mcnemar([False, True, True, True], [True, False, True, True]) == 1
    assert found["single"]["all.low"] < 0 < found["single"]["all.high"]
    assert found["pair"] == {
        "all": 1, "all.low": 1, "all.high": 1, "all.p": 1.0,
        "clip_score": 0.5, "clip_score.low": 0.5, "clip_score.high": 0.5,
    }  # fmt: skip


def test_releases_that_were_asked_different_things_are_not_compared():
    old = score(ROWS, "old")
    for change in ({"prompt": "another"}, {"seed": 99}):
        new = score([ROWS[0] | change, *copy.deepcopy(ROWS[1:])], "new")
        with pytest.raises(Refused, match="different prompts or seeds"):
            compare(new, old)
