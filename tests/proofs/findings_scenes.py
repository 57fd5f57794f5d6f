"""What the findings ask for: the shapes world's held-out prompts, and scenes of three objects, which it does not have.

A triple is said in words that CLIP knows, in a sentence of a form that it never saw, and of a scene that no model was
trained on: the first object above the second, the third to the second's right. The oracle reads any number of objects,
so it can judge one; that it reads true triples rightly is checked with the ceiling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.shapes import oracle
from pipelines.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    CONVERSE,
    SHAPES,
    Object,
    Scene,
    caption,
    generator,
    parse,
    prompts,
    render,
)

SEED = 0
"""Of the prompts: the demo's evaluation asks the same."""
PLACES = ((0.28, 0.27), (0.28, 0.71), (0.71, 0.71))
"""Middles of a triple's objects, as shares of the side, y down."""
JITTER = 0.02


@dataclass(frozen=True)
class Asked:
    """A prompt, what it expects, and how its true pictures are drawn and judged."""

    prompt: str
    expected: dict[str, Any]
    draw: Callable[[int, int, int], NDArray[np.uint8]]
    """(place in the list, seed, side) → uint8 [side, side, 3]."""

    def judge(self, picture: NDArray[np.uint8], reading: oracle.Reading) -> dict[str, bool]:
        """The oracle's verdict."""
        if len(self.expected.get("objects", ())) == 3:
            return judge_triple(reading, self.expected)
        return oracle.judge(picture, self.expected)


@cache
def _asked(scenes: str, count: int) -> tuple[Asked, ...]:
    if scenes == "triple":
        return tuple(_triple(row) for row in range(count))
    found = prompts(scenes, count, SEED)
    return tuple(Asked(one["prompt"], one["expected"], _drawer(one["prompt"])) for one in found)


def asked(scenes: str, count: int) -> list[Asked]:
    """The first `count` of a kind: single, pair or triple."""
    return list(_asked(scenes, count))


def caption_swapped(one: Asked, what: str) -> str:
    """A pair's caption with its two colours exchanged, or with the converse relation."""
    scene = parse(one.prompt)
    first, second = scene.objects
    if what == "relation":
        return caption(Scene((first, second), scene.background, CONVERSE[str(scene.relation)]))
    exchanged = Object(first.shape, second.colour), Object(second.shape, first.colour)
    return caption(Scene(exchanged, scene.background, scene.relation))


def _drawer(prompt: str) -> Callable[[int, int, int], NDArray[np.uint8]]:
    return lambda row, seed, side: render(parse(prompt), generator("true", seed, row), side)


def _triple(row: int) -> Asked:
    rng = generator("triple", SEED, row)
    shapes, colours = rng.sample(SHAPES, 3), rng.sample(list(COLOURS), 3)
    background = rng.choice(list(BACKGROUNDS))
    names = [f"a {colour} {shape}" for colour, shape in zip(colours, shapes, strict=True)]
    prompt = f"{names[0]} above {names[1]} left of {names[2]} on a {background} background"
    objects = [{"shape": shape, "colour": colour} for shape, colour in zip(shapes, colours, strict=True)]

    def draw(place: int, seed: int, side: int) -> NDArray[np.uint8]:
        return draw_triple(shapes, colours, background, place, seed, side)

    return Asked(prompt, {"objects": objects, "background": background}, draw)


def draw_triple(
    shapes: list[str], colours: list[str], background: str, row: int, seed: int, side: int
) -> NDArray[np.uint8]:
    """Three of the world's own small objects, each moved to its place."""
    rng = generator("true triple", seed, row)
    picture = np.full((side, side, 3), BACKGROUNDS[background], np.uint8)
    for shape, colour, (x, y) in zip(shapes, colours, PLACES, strict=True):
        # The world draws a single object about the middle; its jitter there is part of the place.
        one = render(Scene((Object(shape, colour, "small"),), background), rng, side)
        across, down = (round((place - 0.5 + (2 * rng.random() - 1) * JITTER) * side) for place in (x, y))
        one = np.roll(one, (down, across), (0, 1))
        is_object = (one != np.array(BACKGROUNDS[background], np.uint8)).any(2)
        picture[is_object] = one[is_object]
    return picture


def judge_triple(reading: oracle.Reading, expected: dict[str, Any]) -> dict[str, bool]:
    """As the oracle judges a pair, of three objects: who is where is not asked."""
    wanted, seen = expected["objects"], reading.objects[:3]
    truth = {
        "colours": sorted(one.colour for one in seen) == sorted(one["colour"] for one in wanted),
        "shapes": sorted(one.shape for one in seen) == sorted(one["shape"] for one in wanted),
        "objects": sorted((one.colour, one.shape) for one in seen)
        == sorted((one["colour"], one["shape"]) for one in wanted),
        "count": len(reading.objects) == 3,
        "background": reading.background == expected["background"],
    }
    return {**truth, "all": all(truth.values())}
