from __future__ import annotations

import ast
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from pipelines.shapes import oracle, world
from pipelines.shapes.oracle import UNCLEAR, judge, read


def scores(kind: str, n: int, side: int, spoil: Callable[[np.ndarray], np.ndarray] = lambda p: p) -> dict[str, float]:
    """The share of true pictures, spoilt or not, of which the oracle says each thing."""
    prompts = world.prompts(kind, n, seed=11)
    pictures = world.true_pictures(prompts, seed=12, side=side)
    told = [judge(spoil(picture), one["expected"]) for picture, one in zip(pictures, prompts, strict=True)]
    return {name: float(np.mean([one[name] for one in told])) for name in told[0]}


@pytest.mark.parametrize("kind", ["single", "pair"])
def test_the_oracle_is_right_on_true_pictures(kind: str) -> None:
    assert scores(kind, 600, 128)["all"] >= 0.99


@pytest.mark.parametrize("kind", ["single", "pair"])
@pytest.mark.parametrize("side", [64, 32])
def test_the_oracle_is_right_at_the_cascades_lower_sizes(kind: str, side: int) -> None:
    assert scores(kind, 200, side)["all"] >= 0.97


@pytest.mark.parametrize("kind", ["single", "pair"])
def test_blur_and_noise_that_a_person_sees_past_do_not_trouble_it(kind: str) -> None:
    rng = np.random.default_rng(0)

    def spoil(picture: np.ndarray) -> np.ndarray:
        blurred = ndimage.gaussian_filter(picture.astype(float), (2, 2, 0))
        return np.clip(blurred + rng.normal(0, 10, picture.shape) + rng.normal(0, 3, 3), 0, 255).astype(np.uint8)

    assert scores(kind, 150, 128, spoil)["all"] >= 0.97


def test_captions_of_other_pictures_score_by_chance() -> None:
    prompts = world.prompts("single", 384, seed=0)
    pictures = world.true_pictures(prompts, seed=0)
    others = random.Random(0).sample(prompts, len(prompts))
    told = [judge(picture, other["expected"]) for picture, other in zip(pictures, others, strict=True)]
    chance = {"shape": 1 / 4, "colour": 1 / 6, "size": 1 / 2, "background": 1 / 4}
    for name, expected in chance.items():
        assert np.mean([one[name] for one in told]) == pytest.approx(expected, abs=0.1)
    assert np.mean([one["all"] for one in told]) < 0.08


def picture_of(text: str, seed: int = 0) -> np.ndarray:
    return world.render(world.parse(text), random.Random(seed))


def expected_of(text: str) -> dict[str, Any]:
    return world.parse(text).attributes


@pytest.mark.parametrize(
    ("told", "wrong"),
    [
        ("a small red circle on a white background", "size"),
        ("a large blue circle on a white background", "colour"),
        ("a large red square on a white background", "shape"),
        ("a large red circle on a pink background", "background"),
    ],
)
def test_one_wrong_attribute_is_told_and_no_other(told: str, wrong: str) -> None:
    truth = judge(picture_of("a large red circle on a white background"), expected_of(told))
    assert {name for name, right in truth.items() if not right} == {wrong, "all"}


SHOWN = "a red circle to the left of a blue square on a white background"


@pytest.mark.parametrize(
    ("told", "wrong"),
    [
        (SHOWN, set()),
        ("a blue square to the right of a red circle on a white background", set()),
        ("a red square to the left of a blue circle on a white background", {"objects"}),
        ("a red circle to the right of a blue square on a white background", {"relation"}),
        ("a red circle above a blue square on a white background", {"relation"}),
        ("a red circle to the left of a green square on a white background", {"colours", "objects"}),
        ("a red circle to the left of a blue cross on a white background", {"shapes", "objects"}),
        ("a red circle to the left of a blue square on a black background", {"background"}),
        (
            "a green cross to the left of a cyan triangle on a white background",
            {"colours", "shapes", "objects", "relation"},
        ),
    ],
)
def test_binding_relation_and_attributes_of_pairs_are_told_apart(told: str, wrong: set[str]) -> None:
    truth = judge(picture_of(SHOWN), expected_of(told))
    assert {name for name, right in truth.items() if not right} == (wrong | {"all"} if wrong else set())


def test_the_count_is_part_of_the_truth() -> None:
    single, pair = "a small red circle on a white background", SHOWN
    assert judge(picture_of(pair), expected_of(single))["count"] is False
    assert not any(
        judge(picture_of(single), expected_of(pair))[name] for name in ("count", "objects", "relation", "all")
    )
    stained = picture_of(single)
    stained[4:18, 4:18] = (44, 92, 224)
    truth = judge(stained, expected_of(single))
    assert {name for name, right in truth.items() if not right} == {"count", "all"}


def test_an_empty_picture_shows_its_background_alone() -> None:
    blank = np.full((128, 128, 3), 250, np.uint8)
    assert read(blank) == oracle.Reading("white", ())
    truth = judge(blank, expected_of("a small red circle on a white background"))
    assert {name for name, right in truth.items() if right} == {"background"}


def drawn(corners: list[tuple[float, float]], colour: tuple[int, int, int] = (226, 46, 52)) -> np.ndarray:
    picture = Image.new("RGB", (512, 512), (250, 250, 250))
    ImageDraw.Draw(picture).polygon([(512 * x, 512 * y) for x, y in corners], fill=colour)
    return np.asarray(picture.reduce(4))


@pytest.mark.parametrize(
    ("name", "corners"),
    [
        ("diamond", [(0.5, 0.2), (0.8, 0.5), (0.5, 0.8), (0.2, 0.5)]),
        ("rectangle", [(0.2, 0.35), (0.8, 0.35), (0.8, 0.65), (0.2, 0.65)]),
        ("triangle upside down", [(0.2, 0.25), (0.8, 0.25), (0.5, 0.77)]),
        ("half a square", [(0.2, 0.2), (0.8, 0.8), (0.2, 0.8)]),
        ("stroke", [(0.2, 0.2), (0.3, 0.2), (0.8, 0.8), (0.7, 0.8)]),
    ],
)
def test_what_is_none_of_the_four_shapes_is_unclear(name: str, corners: list[tuple[float, float]]) -> None:
    (seen,) = read(drawn(corners)).objects
    assert seen.shape == UNCLEAR
    assert seen.colour == "red"


@pytest.mark.parametrize("colour", [(250, 140, 20), (120, 120, 120), (150, 220, 40), (120, 70, 40)])
def test_what_is_none_of_the_six_colours_is_unclear(colour: tuple[int, int, int]) -> None:
    (seen,) = read(drawn([(0.3, 0.3), (0.7, 0.3), (0.7, 0.7), (0.3, 0.7)], colour)).objects
    assert (seen.shape, seen.colour) == ("square", UNCLEAR)


def test_touching_objects_are_parted_by_their_colours() -> None:
    picture = Image.new("RGB", (128, 128), (250, 250, 250))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((22, 44, 62, 84), fill=(226, 46, 52))
    draw.rectangle((60, 46, 96, 82), fill=(44, 92, 224))
    assert judge(np.asarray(picture), expected_of(SHOWN))["all"]


def test_places_and_areas_are_shares_of_the_picture() -> None:
    (seen,) = read(drawn([(0.25, 0.375), (0.5, 0.375), (0.5, 0.625), (0.25, 0.625)])).objects
    assert seen.centre == pytest.approx((0.375, 0.5), abs=0.005)
    assert seen.area == pytest.approx(1 / 16, rel=0.05)
    assert seen.size == "small"


def test_the_oracle_shares_no_code_with_the_renderer() -> None:
    tree = ast.parse(Path(oracle.__file__).read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported == {"__future__", "dataclasses", "itertools", "math", "typing", "numpy", "scipy"}


def test_what_is_no_picture_is_an_error() -> None:
    with pytest.raises(ValueError, match="uint8"):
        read(np.zeros((128, 128, 3), np.float32))
    with pytest.raises(ValueError, match="≥ 16"):
        read(np.zeros((8, 8, 3), np.uint8))
