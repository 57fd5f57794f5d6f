"""Rules that a recipe cannot have are refused before anything is started, with the path of what is wrong."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from infra.errors import Refused
from infra.records.objects import object_name
from infra.store.opening import open_store
from pipelines.recipe import schema as recipe
from pipelines.recipe import stages as workflow
from pipelines.reports.examples import examples
from pipelines.select.rules import RULES, Aesthetic, BlockedTerms, Contamination, Nsfw, Rule, Size
from pipelines.select.stage import FeatureStage, Select, decide
from pipelines.stage import plain
from tests.fixtures.rules import rejected
from tests.fixtures.samples import table_of
from tests.fixtures.stages import Data, make

VALUES = {
    "filter": [
        ({"rule": "sise"}, r"filter\.rules\.0\.rule is 'sise', which unclip does not have; did you mean 'size'\?"),
        ({"rule": "colour"}, r"filter\.rules\.0\.rule is 'colour', .* its rules: size, aspect, caption"),
        ({"min_side": 3}, r"filter\.rules\.0\.rule is missing"),
        ({"rule": "size"}, r"filter\.rules\.0\.min_side is missing"),
        ({"rule": "size", "min_side": 3, "most": 4}, r"filter\.rules\.0\.most is no known key; known keys: .*min_side"),
        ({"rule": "size", "min_side": 0}, r"filter\.rules\.0: rule size: min_side is 0; it must be at least 1"),
        ({"rule": "aspect", "max_ratio": float("nan")}, r"filter\.rules\.0\.max_ratio: .*valid number"),
        ({"rule": "caption", "min_words": 5, "max_words": 3}, "let no caption stay"),
        ({"rule": "caption", "min_words": 3, "max_characters": 4}, "so no caption would stay"),
        ({"rule": "language", "languages": ["xx"]}, r"filter\.rules\.0: .* xx is none of the languages"),
        ({"rule": "language", "languages": []}, "languages is empty"),
        ({"rule": "blocked_terms", "terms": ["!?"]}, "it would match nothing"),
        ({"rule": "blocked_terms", "file": "nowhere"}, r"filter\.rules\.0: nowhere cannot be read"),
        ({"rule": "near_duplicates", "max_distance": 65}, "max_distance is 65; it must be at most 8"),
        ({"rule": "blank", "min_deviation": -1}, "min_deviation is -1"),
        ({"rule": "watermark", "max_score": 1}, "give either column .* or head"),
        (
            {"rule": "watermark", "column": "nothing", "max_score": 1},
            r"filter\.rules\.0: watermark reads nothing, which .* source\.columns\.keep",
        ),
        ({"rule": "clip_score", "min_score": 0.2}, r"filter\.rules\.0: clip_score reads score, .* under curate\.rules"),
        ({"rule": "contamination", "images": "nowhere"}, r"filter\.rules\.0: nowhere cannot be read"),
        ({"rule": "size", "min_side": 3, "name": "A b"}, "name is 'A b'; write small letters, digits and _"),
    ],
    "curate": [
        ({"rule": "size", "min_side": 3}, r"curate\.rules\.0: size reads height, width, .* under filter\.rules"),
        ({"rule": "clip_score", "top_fraction": 0}, "top_fraction is 0.0; it must be above 0"),
        ({"rule": "clip_score", "min_score": 2}, "min_score is 2.0; it must be at most 1"),
        ({"rule": "clip_score"}, "give either min_score .* or top_fraction"),
        ({"rule": "semantic_duplicates", "min_cosine": 0.9, "clusters": 0}, "clusters is 0; it must be at least 1"),
    ],
}


def planned(group: str, *rules: dict[str, Any]) -> tuple[Rule, ...]:
    """The rules of a whole recipe, as a run would have them."""
    inputs = workflow.Inputs("list.parquet", ("0" * 64,), str(recipe.FOLDER / "prompts.jsonl"), None)
    made = workflow.stages(recipe.load("laion-art", [f"{group}.rules={json.dumps(rules)}"]), inputs)
    (select,) = (stage for stage in made if isinstance(stage, Select) and stage.group == group)
    return select.rules


@pytest.mark.parametrize(
    ("group", "rule", "said"), [(group, rule, said) for group, some in VALUES.items() for rule, said in some]
)
def test_a_rule_that_cannot_be_is_refused_with_its_path(group: str, rule: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        planned(group, rule)


def test_the_path_names_the_rule_that_is_wrong() -> None:
    fine = {"rule": "size", "min_side": 3}
    with pytest.raises(Refused, match=r"filter\.rules\.2: nowhere cannot be read"):
        planned("filter", fine, {"rule": "caption"}, {"rule": "blocked_terms", "file": "nowhere"})
    with pytest.raises(Refused, match=r"filter\.rules\.1: clip_score reads"):
        planned("filter", fine, {"rule": "clip_score", "min_score": 0.1})


HEADS = {
    "two scores": ({"weight": torch.ones(2, 5), "bias": torch.zeros(2)}, r"weight is \[2, 5\] and bias \[2\]"),
    "no width": ({"weight": torch.ones(1, 0), "bias": torch.zeros(1)}, r"\[1, 0\]|finite"),
    "NaN": ({"weight": torch.full((1, 5), torch.nan), "bias": torch.zeros(1)}, "finite floating-point numbers"),
    "NaN bias": ({"weight": torch.ones(1, 5), "bias": torch.full((1,), torch.nan)}, "finite floating-point numbers"),
    "too large": (
        {"weight": torch.full((1, 5), 1e300, dtype=torch.float64), "bias": torch.zeros(1)},
        "finite floating-point",
    ),
    "integers": ({"weight": torch.ones(1, 5).long(), "bias": torch.zeros(1)}, "weight is of int64"),
    "truths": ({"weight": torch.ones(1, 5).bool(), "bias": torch.zeros(1)}, "weight is of bool"),
    "bfloat16": ({"weight": torch.ones(1, 5).bfloat16(), "bias": torch.zeros(1)}, "in float16 or float32"),
    "other names": ({"w": torch.ones(1, 5)}, "no safetensors file with `weight` and `bias`"),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_that_gives_no_score_is_refused_before_a_run(tmp_path: Path, case: str) -> None:
    tensors, said = HEADS[case]
    save_file(tensors, tmp_path / "head.safetensors")
    with pytest.raises(Refused, match=said) as refused:
        planned("curate", {"rule": "aesthetic", "head": str(tmp_path / "head.safetensors"), "min_score": 5})
    assert str(refused.value).startswith(f"curate.rules.0: {tmp_path / 'head.safetensors'}")


class Mark:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.folder,)


def test_a_pickle_for_a_head_or_a_set_is_never_read(tmp_path: Path) -> None:
    torch.save({"weight": Mark(tmp_path / "ran")}, tmp_path / "head.pt")
    (tmp_path / "set.npy").write_bytes(pickle.dumps(Mark(tmp_path / "ran")))
    np.save(tmp_path / "objects.npy", np.array([Mark(tmp_path / "ran")], object), allow_pickle=True)
    for rule in (
        {"rule": "aesthetic", "head": str(tmp_path / "head.pt"), "min_score": 5},
        {"rule": "contamination", "embeddings": str(tmp_path / "set.npy")},
        {"rule": "contamination", "embeddings": str(tmp_path / "objects.npy")},
    ):
        with pytest.raises(Refused, match=r"curate\.rules\.0: .* is no "):
            planned("curate", rule)
    assert not (tmp_path / "ran").exists()


def test_a_set_and_a_head_of_another_width_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "set.npy", np.eye(5))
    save_file({"weight": torch.ones(1, 5), "bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    rows = {"image_embedding": [[1.0, 0.0, 0.0, 0.0]]}
    files = {"embeddings": str(tmp_path / "set.npy"), "head": str(tmp_path / "head.safetensors")}
    for rule in (Contamination(embeddings=files["embeddings"]), Aesthetic(head=files["head"], min_score=0)):
        with pytest.raises(Refused, match=f"rule {rule.rule}: .* width 5, and CLIP's has 4"):
            rejected(rule.opened(), rows)
    np.save(tmp_path / "set.npy", np.array([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(Refused, match="row 1 is 0"):
        Contamination(embeddings=str(tmp_path / "set.npy")).opened()


def test_every_rule_says_what_it_reads_and_what_it_does() -> None:
    """Each of issue and documentation, and each by a name of its own."""
    assert {"size", "aspect", "caption", "language", "blocked_terms", "exact_duplicates", "near_duplicates", "blank",
            "watermark", "nsfw", "aesthetic", "clip_score", "semantic_duplicates", "contamination"} == {
        kind.__dataclass_fields__["rule"].default for kind in RULES  # type: ignore[attr-defined]
    }  # fmt: skip
    for kind in RULES:
        assert str(kind.__doc__).startswith("Rejects "), kind
        assert "columns" in dir(kind)


# Several of one kind.


def table(captions: list[str], sides: list[int]) -> pa.Table:
    return pa.table({"caption": captions, "width": pa.array(sides, pa.int32()), "height": pa.array(sides, pa.int32())})


@dataclass(frozen=True)
class Seen:
    """What the rules saw of a table."""

    rules: tuple[Rule, ...]
    table: pa.Table

    @property
    def rows(self) -> int:
        return self.table.num_rows

    def part(self, rule: str) -> pa.Table:
        return next(one.features(self.table) for one in self.rules if one.label == rule)


def verdicts(rules: tuple[Rule, ...], rows: pa.Table) -> list[str | None]:
    names = [rule.label for rule in rules]
    marks = [mark for _, marked in decide(rules, [Seen(rules, rows)]) for mark in marked]
    return [names[mark] if mark >= 0 else None for mark in marks]


def test_a_row_is_marked_with_the_first_of_several_rules_of_one_kind() -> None:
    rules = planned(
        "filter",
        {"rule": "blocked_terms", "name": "brands", "terms": ["acme"]},
        {"rule": "size", "min_side": 10},
        {"rule": "blocked_terms", "terms": ["acme", "rude"]},
    )
    rows = table(["an acme cat", "a rude acme", "rude", "a cat", "rude and small"], [20, 5, 20, 20, 5])
    marks = ["blocked_terms-brands", "blocked_terms-brands", "blocked_terms", None, "size"]
    assert verdicts(rules, rows) == marks
    assert verdicts(rules[::-1], rows) == ["blocked_terms", "blocked_terms", "blocked_terms", None, "blocked_terms"]


def test_rules_that_cannot_be_told_apart_are_refused() -> None:
    for names in ({}, {"name": "a"}):
        rule = {"rule": "size", "min_side": 3, **names}
        with pytest.raises(Refused, match=r"filter\.rules has 'size(-a)?' twice; give each a `name`"):
            planned("filter", rule, rule)


def test_a_rule_without_a_name_has_the_key_that_it_had() -> None:
    assert plain(Size(min_side=3)) == {"min_side": 3, "rule": "size"}
    assert plain(Size(min_side=3, name="a")) == {"min_side": 3, "rule": "size", "name": "a"}


def test_named_rules_reconcile_in_every_account(data: Data, tmp_path: Path) -> None:
    store = open_store(str(shutil.copytree(data.store.uri, tmp_path / "store")))
    one, both = BlockedTerms(name="red", terms=("red",)), BlockedTerms(name="colours", terms=("red", "blue"))
    rules = (one, Size(min_side=64), both)
    looks = make(store, FeatureStage("filter", rules), data.download)
    chosen = make(store, Select("filter", rules), looks, data.download)
    assert set(chosen.states) == {"kept", "blocked_terms-red", "blocked_terms-colours"}
    assert sum(chosen.states.values()) == data.download.states["kept"]
    index = table_of(store, data.download, "index.parquet")
    captions = {row["uid"]: str(row["caption"]).split() for row in index if row["state"] == "kept"}
    files = chosen.only.files.values()
    marks = [row for file in files for row in pq.read_table(store.local(object_name(file.sha256))).to_pylist()]
    for row in marks:
        red, blue = ("red" in captions[row["uid"]]), ("blue" in captions[row["uid"]])
        assert row["rule"] == ("blocked_terms-red" if red else "blocked_terms-colours" if blue else None)
    assert Counter(row["rule"] or "kept" for row in marks) == chosen.states
    shown = examples(store, "filter", data.download, chosen)
    assert shown.keys() == chosen.states.keys() - {"kept"}
    assert all(shown.values())


def test_what_is_not_to_be_seen_is_not_shown_under_another_name() -> None:
    from pipelines.reports.examples import UNSEEN
    from pipelines.select.rules.base import kind_of

    for rule in (Nsfw(column="punsafe", max_score=0.5), Nsfw(column="punsafe", max_score=0.5, name="strict")):
        assert kind_of(rule.label) in UNSEEN
    assert kind_of(BlockedTerms(terms=("a",), name="nsfw").label) not in UNSEEN
