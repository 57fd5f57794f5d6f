"""The shapes world: what can be seen, how it is said, how it is drawn, and what training never sees.

A scene is one object (shape, colour, size) or two (shape and colour each, and a relation) on a plain background. The
two objects of a pair share neither shape nor colour, so that swapping any attribute between them can be seen.
Everything follows from (seed, index, share of pairs) by SHA-256: the same triple is the same scene, words and pixels.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from dataclasses import dataclass
from functools import cache
from math import cos, pi, sin
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from infra.errors import Refused

COLOURS = {
    "red": (226, 46, 52),
    "yellow": (250, 202, 34),
    "green": (52, 170, 78),
    "cyan": (30, 196, 214),
    "blue": (44, 92, 224),
    "purple": (146, 58, 196),
}
BACKGROUNDS = {"white": (250, 250, 248), "black": (22, 22, 26), "gray": (142, 144, 150), "pink": (255, 198, 212)}
SHAPES = ("circle", "square", "triangle", "cross")
# Half the nominal width of a shape, as a fraction of the picture's side.
SIZES = {"small": 0.19, "large": 0.31}
# A relation and the one that says the same with the objects exchanged.
CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

SINGLE_JITTER = 0.06  # a single object's centre is uniform over 12 % of the side, in both directions
PAIR_OFFSET = 0.23  # each object of a pair lies this far from the pair's middle, along the relation
PAIR_JITTER = 0.05  # a pair's middle is uniform over 10 % of the side, in both directions
PAIR_SLACK = 0.03  # and each object of it, across the relation
PARAPHRASED = 0.15  # share of captions that are not in the canonical form
HELD_OUT_PAIRS = 0.2  # share of pair arrangements that are held out (by hash, so about)
HELD_OUT_FILE = Path(__file__).with_name("heldout.txt")


@dataclass(frozen=True)
class Object:
    """A shape with a colour; `size` is None in a pair, whose objects are all of one size."""

    shape: str
    colour: str
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one object, or two with the first one's place relative to the second."""

    objects: tuple[Object, ...]
    background: str
    relation: str | None = None

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise Refused(f"The shapes world has no background {self.background!r}, only {', '.join(BACKGROUNDS)}.")
        for one in self.objects:
            if one.shape not in SHAPES or one.colour not in COLOURS:
                raise Refused(f"The shapes world has no {one.colour} {one.shape}.")
        sizes = [one.size for one in self.objects]
        if len(sizes) == 1 and sizes[0] in SIZES and self.relation is None:
            return
        if len(sizes) != 2 or sizes != [None, None] or self.relation not in CONVERSE:
            raise Refused("A scene is one object with a size, or two objects without sizes and a relation.")
        first, second = self.objects
        if first.shape == second.shape or first.colour == second.colour:
            raise Refused("The two objects of a pair share neither shape nor colour.")

    @property
    def attributes(self) -> dict[str, Any]:
        """The scene as plain JSON: what a picture of it is judged by."""
        if self.relation is None:
            (one,) = self.objects
            return {"shape": one.shape, "colour": one.colour, "size": one.size, "background": self.background}
        objects = [{"shape": one.shape, "colour": one.colour} for one in self.objects]
        return {"objects": objects, "relation": self.relation, "background": self.background}


# What there is, and what of it is held out --------------------------------------------------------------------------


@cache
def singles() -> tuple[Scene, ...]:
    """All scenes of one object: 4 shapes × 6 colours × 2 sizes × 4 backgrounds."""
    return tuple(
        Scene((Object(shape, colour, size),), background)
        for shape, colour, size, background in itertools.product(SHAPES, COLOURS, SIZES, BACKGROUNDS)
    )


@cache
def arrangements() -> tuple[tuple[Object, str, Object], ...]:
    """All (object, relation, object) of pairs; each arrangement of things appears twice, said from either side."""
    objects = [Object(shape, colour) for shape, colour in itertools.product(SHAPES, COLOURS)]
    return tuple(
        (first, relation, second)
        for first, relation, second in itertools.product(objects, CONVERSE, objects)
        if first.shape != second.shape and first.colour != second.colour
    )


def held_out(scene: Scene) -> bool:
    """Whether training must never see this scene.

    A single is held out as (shape, colour, size, background): a Latin pattern over a sixth of them, so that training
    still sees every value and every pair of values, and every (shape, colour, background) in one of its sizes. A pair
    is held out as (object, relation, object), on every background and in both ways to say it: red left of blue is the
    same picture as blue right of red.
    """
    if scene.relation is None:
        (one,) = scene.objects
        shape, colour = SHAPES.index(one.shape), list(COLOURS).index(one.colour)
        size, background = list(SIZES).index(str(one.size)), list(BACKGROUNDS).index(scene.background)
        return (shape + colour + size) % 3 != 0 and background == (shape + colour + 2 * size) % 4
    return _held_out_arrangement(*scene.objects, scene.relation)


@cache
def _held_out_arrangement(first: Object, second: Object, relation: str) -> bool:
    if relation in ("right of", "below"):
        return _held_out_arrangement(second, first, CONVERSE[relation])
    name = f"{first.colour} {first.shape} {relation} {second.colour} {second.shape}"
    return _fraction("held out", name) < HELD_OUT_PAIRS


def held_out_lines() -> list[str]:
    """Every held-out combination, one readable line each: what heldout.txt lists."""
    lines = []
    for scene in singles():
        if held_out(scene):
            (one,) = scene.objects
            lines.append(f"single: {one.size} {one.colour} {one.shape}, {scene.background}")
    for first, relation, second in arrangements():
        if _held_out_arrangement(first, second, relation):
            lines.append(f"pair: {first.colour} {first.shape} {relation} {second.colour} {second.shape}")
    return lines


@cache
def _choices(kind: str, held: bool) -> tuple[Scene, ...]:
    """All scenes of a kind ("single" or "pair") on the training side or the held-out side."""
    if kind == "single":
        return tuple(scene for scene in singles() if held_out(scene) == held)
    return tuple(
        Scene((first, second), background, relation)
        for first, relation, second in arrangements()
        if _held_out_arrangement(first, second, relation) == held
        for background in BACKGROUNDS
    )


# Words --------------------------------------------------------------------------------------------------------------

_SAID = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
_SAID_OTHERWISE = {"left of": "left of", "right of": "right of", "above": "over", "below": "under"}
_SIZE_OTHERWISE = {"small": "little", "large": "big"}
_ATTRIBUTES = rf"(?P<colour{{0}}>{'|'.join(COLOURS)}) (?P<shape{{0}}>{'|'.join(SHAPES)})"
_BACKGROUND = rf"on a (?P<background>{'|'.join(BACKGROUNDS)}) background"
_SIZE_WORDS = {word: size for table in ({s: s for s in SIZES}, _SIZE_OTHERWISE) for size, word in table.items()}
_RELATION_WORDS = {word: relation for table in (_SAID, _SAID_OTHERWISE) for relation, word in table.items()}
_SINGLE = re.compile(rf"(?:a picture of )?a (?P<size>{'|'.join(_SIZE_WORDS)}) {_ATTRIBUTES.format(1)} {_BACKGROUND}")
_PAIR = re.compile(
    rf"(?:a picture of )?a {_ATTRIBUTES.format(1)} (?P<relation>{'|'.join(_RELATION_WORDS)}) "
    rf"a {_ATTRIBUTES.format(2)} {_BACKGROUND}"
)


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """The scene in words: canonical without `rng`, else a paraphrase in `PARAPHRASED` of the draws."""
    style = rng.random() if rng is not None else 1.0
    opening = "a picture of " if style < PARAPHRASED / 2 else ""
    otherwise = PARAPHRASED / 2 <= style < PARAPHRASED
    if scene.relation is None:
        (one,) = scene.objects
        size = str(one.size)
        word = _SIZE_OTHERWISE[size] if otherwise else size
        what = f"a {word} {one.colour} {one.shape}"
    else:
        first, second = scene.objects
        word = (_SAID_OTHERWISE if otherwise else _SAID)[scene.relation]
        what = f"a {first.colour} {first.shape} {word} a {second.colour} {second.shape}"
    return f"{opening}{what} on a {scene.background} background"


def parse(text: str) -> Scene:
    """The scene that a caption (canonical or paraphrased) describes; `Refused` if the grammar does not know it."""
    words = " ".join(text.lower().split()).rstrip(".")
    if found := _SINGLE.fullmatch(words):
        one = Object(found["shape1"], found["colour1"], _SIZE_WORDS[found["size"]])
        return Scene((one,), found["background"])
    if found := _PAIR.fullmatch(words):
        first, second = (Object(found[f"shape{n}"], found[f"colour{n}"]) for n in (1, 2))
        return Scene((first, second), found["background"], _RELATION_WORDS[found["relation"]])
    raise Refused(
        f"{text!r} is no caption of the shapes world. Say it as 'a large red circle on a white background' or as "
        "'a red circle to the left of a blue square on a white background'."
    )


# Pixels -------------------------------------------------------------------------------------------------------------


@cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """A polygon's corners about the middle of its bounding box, y down, in units of a size's half width."""
    if shape == "square":
        return ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9))
    if shape == "cross":
        long, thick = 1.1, 0.44  # thick arms survive at 32 px
        corner = ((-thick, -long), (thick, -long), (thick, -thick), (long, -thick), (long, thick), (thick, thick))
        return (*corner, *((-x, -y) for x, y in corner))
    corners = [(1.3 * sin(2 * pi * n / 3), -1.3 * cos(2 * pi * n / 3)) for n in range(3)]
    middle = (min(y for _, y in corners) + max(y for _, y in corners)) / 2
    return tuple((x, y - middle) for x, y in corners)


def _places(scene: Scene, rng: random.Random) -> list[tuple[float, float]]:
    """The centre (x, y) of each object, as fractions of the side, y down."""

    def within(limit: float) -> float:
        return (2 * rng.random() - 1) * limit

    if scene.relation is None:
        return [(0.5 + within(SINGLE_JITTER), 0.5 + within(SINGLE_JITTER))]
    x, y = 0.5 + within(PAIR_JITTER), 0.5 + within(PAIR_JITTER)
    places = []
    for side in (-1, 1) if scene.relation in ("left of", "above") else (1, -1):
        along, across = side * PAIR_OFFSET, within(PAIR_SLACK)
        places.append((x + along, y + across) if scene.relation in ("left of", "right of") else (x + across, y + along))
    return places


def render(scene: Scene, rng: random.Random, side: int = 128) -> NDArray[np.uint8]:
    """Draw the scene: uint8 [side, side, 3]. `rng` gives the places; 4 × 4 samples a pixel."""
    picture = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    fine = 4
    for one, (x, y) in zip(scene.objects, _places(scene, rng), strict=True):
        half = SIZES[one.size or "small"]
        # Draw in a mask no larger than the shape: a quarter of the time of a mask as large as the picture.
        left, top = int((x - 1.2 * half) * side), int((y - 1.2 * half) * side)
        width = int(2.4 * half * side) + 3
        mask = Image.new("L", (width * fine, width * fine))
        scale, draw = half * side * fine, ImageDraw.Draw(mask)
        # Pillow's coordinates name the middles of samples, hence the half.
        middle_x, middle_y = (x * side - left) * fine - 0.5, (y * side - top) * fine - 0.5
        if one.shape == "circle":
            draw.ellipse((middle_x - scale, middle_y - scale, middle_x + scale, middle_y + scale), fill=255)
        else:
            draw.polygon([(middle_x + scale * dx, middle_y + scale * dy) for dx, dy in _outline(one.shape)], fill=255)
        picture.paste(COLOURS[one.colour], (left, top), mask.reduce(fine))
    return np.array(picture)


# Draws --------------------------------------------------------------------------------------------------------------


def scene_of(index: int, seed: int, pairs: float = 0.3) -> tuple[Scene, str, int]:
    """Row `index` of the training list: its scene (never a held-out one), its caption and its picture's seed."""
    rng = generator("scene", seed, index)
    options = _choices("pair" if rng.random() < pairs else "single", False)
    scene = options[int(rng.random() * len(options))]
    return scene, caption(scene, rng), int(rng.random() * 2**53)


def picture_of(index: int, seed: int, pairs: float = 0.3, side: int = 128) -> NDArray[np.uint8]:
    """The picture of row `index` of the training list, uint8 [side, side, 3]."""
    scene, _, picture_seed = scene_of(index, seed, pairs)
    return render(scene, random.Random(picture_seed), side)


def prompts(kind: str, n: int, seed: int) -> list[dict[str, Any]]:
    """`n` held-out prompts of a kind ("single" or "pair"), in the canonical form, every combination equally often.

    Each is {"prompt": caption, "kind": kind, "expected": attributes}. Combinations come back when there are fewer than
    `n`: the same prompt with other noise is another picture.
    """
    if kind not in ("single", "pair"):
        raise Refused(f"The shapes world has prompts of the kinds 'single' and 'pair', not {kind!r}.")
    options, rng = _choices(kind, True), generator("prompts", kind, seed)
    drawn: list[Scene] = []
    while len(drawn) < n:
        drawn += sorted(options, key=lambda _: rng.random())
    return [{"prompt": caption(scene), "kind": kind, "expected": scene.attributes} for scene in drawn[:n]]


def true_pictures(prompted: list[dict[str, Any]], seed: int, side: int = 128) -> NDArray[np.uint8]:
    """True pictures of prompts, uint8 [n, side, side, 3]: the ceiling of what a generator can score."""
    return np.stack([render(parse(one["prompt"]), generator("true", seed, n), side) for n, one in enumerate(prompted)])


def generator(*words: object) -> random.Random:
    """A generator that depends on nothing but the words, on any machine and in any order of calls."""
    return random.Random(int.from_bytes(hashlib.sha256(repr(words).encode()).digest(), "big"))


def _fraction(*words: object) -> float:
    return generator(*words).random()
