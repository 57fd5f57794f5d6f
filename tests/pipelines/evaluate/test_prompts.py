"""Prompt files: what is refused, and what a longer list leaves untouched."""

from __future__ import annotations

import json

import pytest

from infra.errors import Refused
from pipelines.evaluate.prompts import Prompt, alternatives, chunks, expected_values, read_prompts
from pipelines.shapes.lists import write_prompts


def circle(colour: str, background: str = "white") -> Prompt:
    expected = {"shape": "circle", "colour": colour, "background": background}
    return Prompt(f"a {colour} circle on a {background} background", "single", expected)


def test_a_file_is_read_line_by_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a red circle"}\n\n{"prompt": "two", "kind": "pair", "expected": {"count": 2}}\n')
    assert read_prompts(path) == (Prompt("a red circle"), Prompt("two", "pair", {"count": 2}))


def test_the_shapes_worlds_prompts_are_read(tmp_path):
    write_prompts(tmp_path / "p.jsonl", 5, 3, seed=1)
    found = read_prompts(tmp_path / "p.jsonl")
    assert [prompt.kind for prompt in found] == ["single"] * 5 + ["pair"] * 3
    assert found[0].document == json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no prompts"),
        ("\n  \n", "no prompts"),
        ('{"prompt": "a"}\nred circle\n', "line 2 is no JSON"),
        ('{"text": "a"}\n', 'line 1 has no "prompt"'),
        ('["a"]\n', 'line 1 has no "prompt"'),
        ('{"prompt": "a", "kind": "../x"}\n', "line 1: kind"),
        ('{"prompt": "a", "extra": 1}\n', "extra"),
        ('{"prompt": "a", "expected": 3}\n', "must be a mapping"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, text, reason):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(Refused, match=reason):
        read_prompts(tmp_path / "p.jsonl")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(Refused, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")


def test_added_prompts_change_no_full_chunk_before_them():
    prompts = [circle(colour) for colour in ("red", "blue", "red", "blue", "red")]
    before, after = list(chunks(prompts, 2)), list(chunks([*prompts, circle("blue"), circle("red")], 2))
    assert [len(chunk.prompts) for chunk in after] == [2, 2, 2, 1]
    assert [chunk.first for chunk in after] == [0, 2, 4, 6]
    assert [c.digest for c in before[:2]] == [c.digest for c in after[:2]]
    assert before[2].digest != after[2].digest


def test_equal_prompts_at_different_places_are_different_work():
    first, second = chunks([circle("red")] * 2, 1)
    assert first.digest != second.digest


def test_alternatives_differ_in_one_attribute():
    prompts = [circle("red"), circle("blue"), circle("white", "black")]
    values = expected_values(prompts)["single"]
    assert values == {"colour": ["blue", "red", "white"], "background": ["black", "white"]}
    assert alternatives(prompts[0], values) == {
        "colour": [
            "a red circle on a white background",
            "a blue circle on a white background",
            "a white circle on a white background",
        ],
        "background": ["a red circle on a white background", "a red circle on a black background"],
    }


def test_a_value_that_stands_twice_in_a_prompt_has_no_alternatives():
    prompt = circle("white", "white")
    assert alternatives(prompt, {"colour": ["red", "white"], "background": ["black", "white"]}) == {}
