"""Whatever a recipe says that cannot be is refused at once, in one sentence with the dotted path and the recipe."""

from __future__ import annotations

import copy
import dataclasses
import math
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest

from infra.errors import Refused
from pipelines.recipe import schema as recipe
from pipelines.recipe import stages as workflow
from pipelines.recipe import yaml as document
from pipelines.stage import error_context
from tests.fixtures.cells import marked

RULES = """[{rule: size, min_side: 64}, {rule: aspect, max_ratio: 2}, {rule: caption}, {rule: exact_duplicates},
            {rule: clip_score, min_score: 0.1}, {rule: blank}, {rule: language, languages: [en]},
            {rule: blocked_terms, terms: [x]}, {rule: near_duplicates}, {rule: watermark, column: a, max_score: 1},
            {rule: nsfw, column: a, max_score: 1}, {rule: aesthetic, column: a, min_score: 1},
            {rule: semantic_duplicates, min_cosine: 0.9}, {rule: contamination, images: a}]"""
MAY_BE_NEGATIVE = {"t_mean", "min_score", "max_score", "min_cosine", "init_logit_scale"}


def base(*changes: str) -> dict[str, Any]:
    read = document.read(recipe.FOLDER / "demo.yaml")
    for one in (f"filter.rules={RULES}", f"curate.rules={RULES}", *changes):
        document.change(read, one)
    return read


OPTIONAL = ("inpainter.train.steps=7", "noised_clip.train.steps=7", "world.labels=true", "source.columns.keep=[shape]",
            "classifier={labels: [shape], train: {steps: 7}}")  # fmt: skip
BASES = {
    "prior": base(*OPTIONAL),
    "ar_prior": base("prior=null", "ar_prior.train.steps=7"),
}


def checked(read: dict[str, Any]) -> None:
    """All that is checked of a recipe before its lists are read."""
    parsed = recipe.parse(read, "mine.yaml")
    with error_context("Recipe mine.yaml"):
        workflow.models(parsed)


def numbers(hint: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], type, bool]]:
    """(path, int or float, whether a list stands there) of every number that a recipe may hold."""
    if get_origin(hint) is Annotated:
        yield from numbers(get_args(hint)[0], path)
    elif dataclasses.is_dataclass(hint):
        for name, inner in get_type_hints(hint, include_extras=True).items():
            yield from numbers(inner, (*path, name))
    elif hint in (int, float):
        yield path, hint, False
    elif get_origin(hint) in (Union, types.UnionType):
        rules = [choice for choice in get_args(hint) if choice in recipe.RULES]
        for choice in get_args(hint):
            number = (rules.index(choice),) if choice in rules else ()
            yield from numbers(choice, (*path, *number))
    elif get_origin(hint) is dict and get_args(hint)[0] is int:
        yield from numbers(get_args(hint)[1], (*path, 64))
    elif get_origin(hint) is tuple and get_args(hint)[0] in (int, float):
        yield path, get_args(hint)[0], True
    elif get_origin(hint) is tuple:
        yield from numbers(get_args(hint)[0], path)


NUMBERS = [one for one in numbers(recipe.Recipe) if one[0][0] != "schema_version"]


def put(read: dict[str, Any], path: tuple[str | int, ...], value: Any) -> None:
    place: Any = read
    for step in path[:-1]:
        if isinstance(place, dict) and place.get(step) is None:
            place[step] = {}
        place = place[step]
    place[path[-1]] = value


def test_the_walk_reaches_every_corner() -> None:
    found = {".".join(map(str, path)) for path, _, _ in NUMBERS}
    assert len(found) > 200
    assert {"clip.model.vision_cfg.width", "curate.rules.4.min_score", "upsamplers.64.model.multiples", "world.pairs",
            "sampling.upsamplers.64.gamma", "ar_prior.train.ema", "evaluate.cpus", "cluster.cpus"} <= found  # fmt: skip


@pytest.mark.parametrize("bad", marked([-1, 2**63, math.nan, math.inf, "many", True], ["many"], pytest.mark.slow))
def test_every_number_of_a_recipe_refuses_what_it_cannot_be(bad: Any) -> None:
    accepted = []
    for path, kind, listed in NUMBERS:
        leaf = str(path[-1])
        if (bad == -1 and leaf in MAY_BE_NEGATIVE) or (bad == 2**63 and kind is float):
            continue
        read = copy.deepcopy(BASES["ar_prior" if path[0] == "ar_prior" else "prior"])
        put(read, path, [bad, bad] if listed else bad)
        try:
            checked(read)
        except Refused as error:
            if "Recipe mine.yaml" in str(error) and leaf in str(error) and str(path[0]) in str(error):
                continue
            accepted.append((path, str(error)))
        else:
            accepted.append((path, "accepted"))
    assert not accepted


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["clip.model={}"], r"clip\.model\.embed_dim is missing; .*vision_cfg is missing; .*text_cfg is missing"),
        (["clip.model.text_cfg.heads=3"], r"clip\.model\.text_cfg\.heads is 3; it must divide the width, 64"),
        (["clip.model.text_cfg.vocab_size=100"], r"vocab_size is 100; it must be at least 514"),
        (["clip.model.text_cfg.haeds=2"], r"text_cfg\.haeds is no known key; did you mean 'heads'"),
        (["clip.model.vision_cfg={patch_size: 9}"], r"vision_cfg\.image_size is 224; it must be a multiple of 9"),
        (["clip.model.vision_cfg.image_size=48"], r"image_size is 48; it must be a multiple of 32, since a ResNet"),
        (["clip.model.vision_cfg.head_width=48"], r"head_width is 48; it must divide the attention's width, 512"),
        (["clip.model.vision_cfg.layers=[1, 2]"], r"clip\.model\.vision_cfg\.layers"),
        (["prior.model.embedding=7"], r"prior\.model\.embedding is no known key"),
        (["prior.model.heads=3"], r"prior\.model: .*128 does not divide into 3 heads"),
        (["upsamplers.64.model.schedule=square"], r"upsamplers\.64\.model: .*'square' is unknown; use one of cosine"),
        (["decoder.train.weighting=x"], r"decoder\.train\.weighting is 'x'; use one of uniform, min_snr"),
        (["upsamplers.64.train.crop=20"], r"upsamplers\.64: train\.crop is 20; it must divide by 16"),
        (["upsamplers.-64={}"], r"upsamplers\.-64"),
        (["sampling.decoder.steps=5000"], r"sampling\.decoder: steps is 5000, and the model has 1000 timesteps"),
        (
            ["sampling.prior={sampler: analytic_dpm, gamma: [1]}"],
            r"sampling\.prior: gamma has 1 numbers",
        ),
        (["sampling.prior.temperature=0.5"], r"sampling\.prior: .*only an autoregressive prior has a temperature"),
        (["models=huge"], r"models: preset 'huge' is unknown; use one of paper"),
        (["world.module=a b"], r"world\.module is 'a b'"),
        (["source.urls=''"], r"source\.urls is missing"),
        (["evaluate.judge=:x"], r"evaluate\.judge is ':x'; name a function as module:function"),
        (["gate.minimum={x: much}"], r"gate\.minimum\.x: Input should be a valid number"),
        (["tracking.uri=''"], r"tracking\.uri is empty"),
        (["prior.train.lr=2024-01-01"], r"prior\.train\.lr is a date; write numbers, texts \(in quotes\)"),
    ],
)
def test_what_does_not_fit_together_is_named_where_it_stands(changes: list[str], said: str) -> None:
    with pytest.raises(Refused, match=f"^Recipe mine.yaml: .*{said}"):
        checked(base(*changes))


def test_what_a_clip_configuration_says_is_kept_as_it_is() -> None:
    """It is in CLIP's key, so neither order nor form may change, nor may defaults be filled in."""
    written = base()["clip"]["model"]
    assert repr(recipe.parse(base(), "mine").clip.model) == repr(written)


@pytest.mark.parametrize("name", ["demo", "tiny", "laion-art", "paper"])
def test_the_checks_let_our_own_recipes_pass(name: str) -> None:
    workflow.models(recipe.load(name))


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n- b\n", "holds no mapping of sections"),
        ("just words", "holds no mapping of sections"),
        ("models: demo\nclip: {}\nmodels: tiny\n", "line 3, column 1: the key 'models' is in line 1 already"),
        ("clip: {train: {steps: 1, steps: 2}}", "line 1, column 26: the key 'steps' is in line 1 already"),
        ("models: [demo", "line 1, column 14: "),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: " + "{a: " * 100 + "1" + "}" * 100, "nested more than 32 levels deep"),
        (laughs(9), "more than 10,000 values"),
        ("a: &a [*a]", "more than 32 levels deep|more than 10,000 values"),
        ("a: 2024-99-99", "is not valid YAML: month must be in 1..12"),
        ("a: " + "9" * 5000, "is not valid YAML: Exceeds the limit"),
        ("a: !!python/object:os.system {}", "line 1, column 4: could not determine a constructor"),
        ("a: !!binary aGFsbG8=", "a is a bytes"),
        ("? [a, b]\n: c", "line 1, column 3: found unhashable key"),
        ("a: *nothing", "line 1, column 4: found undefined alias"),
        ("a: \x07", "is not valid YAML: unacceptable character"),
        ("a: b\n" * 300_000, "more than 1,048,576 bytes"),
        ("prior: .nan", "prior is nan; it must be a finite number"),
    ],
)
def test_a_file_that_is_no_recipe_is_told_from_one(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(Refused, match=rf"(?s)mine\.yaml.*({said})") as refused:
        recipe.load(str(path))
    assert len(str(refused.value)) < 400 + len(str(path))


def test_what_is_no_text_file_is_told_from_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("models: demö".encode("latin-1"))
    with pytest.raises(Refused, match=r"latin\.yaml is not valid YAML: it is no text in UTF-8 \(byte 11\)"):
        recipe.load(str(tmp_path / "latin.yaml"))
    with pytest.raises(Refused, match=r"is a folder; a recipe is a YAML file"):
        recipe.load(str(tmp_path))
    with pytest.raises(Refused, match=r"There is no recipe 'aaa.*File name too long"):
        recipe.load("a" * 300)
    with pytest.raises(Refused, match="There is no recipe ''"):
        recipe.load("")
    with pytest.raises(Refused, match=r"--set .*nested too deeply"):
        recipe.load("demo", [f"models={'[' * 5000}"])
    with pytest.raises(Refused, match=r"upsamplers\.64 is there as a text and as a number"):
        recipe.parse(base() | {"upsamplers": {64: {}, "64": {}}}, "mine")


def test_anchors_and_merges_are_no_duplicates(tmp_path: Path) -> None:
    text = (recipe.FOLDER / "tiny.yaml").read_text()
    text = text.replace("prior:\n", "prior: &shared\n", 1).replace("decoder:\n", "decoder:\n  <<: *shared\n", 1)
    (tmp_path / "mine.yaml").write_text(text)
    assert recipe.load(str(tmp_path / "mine.yaml")).decoder == recipe.load("tiny").decoder
