"""The oracle: reads shapes, colours, sizes and places back from pixels, without learning.

It knows what the words mean in its own terms (a hue, an ideal outline, a share of the picture's width) and shares
nothing with the renderer. It sees past blur, noise and ragged edges as a person would, but a blob that overlaps no
ideal outline well is "unclear", a hue between two colours is "unclear", and a stray blob counts as an object.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from math import cos, pi, sin, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.floating[Any]]

VERSION = 1  # raise whenever a picture could be read differently: scores of two versions are not comparable

UNCLEAR = "unclear"
# Hue in degrees, from and up to; the gaps between belong to nobody.
HUES = {
    "red": (338.0, 374.0),
    "yellow": (36.0, 66.0),
    "green": (88.0, 164.0),
    "cyan": (172.0, 199.0),
    "blue": (206.0, 251.0),
    "purple": (258.0, 318.0),
}
OBJECT_SATURATION = 0.33  # HSV saturation and value below which an object has no colour to speak of
OBJECT_VALUE = 0.25
CONTRAST = 44.0  # difference from the background (largest of the three channels, 0–255) that makes a pixel an object's
SMALLEST = 0.006  # blobs below this share of the picture are noise, above it they count as objects
# Least overlap (intersection over union) with the ideal outline. A diamond overlaps the circle by 0.83; a ragged edge
# costs the cross most, which has most of it.
OVERLAPS = {"circle": 0.88, "square": 0.84, "triangle": 0.80, "cross": 0.72}
SHARPEN = 3.0  # edges are this much steeper when areas are compared: blur is no part of a shape
# Width of a square of equal area, as a share of the picture's side. Between the two a size is unclear.
WIDTHS = {"small": (0.12, 0.385), "large": (0.395, 0.80)}


@dataclass(frozen=True)
class Seen:
    """One object as the oracle sees it."""

    shape: str
    colour: str
    size: str
    centre: tuple[float, float]  # x, y as shares of the side, y down
    area: float  # share of the picture


@dataclass(frozen=True)
class Reading:
    """What the oracle sees in one picture; the objects in descending order of area."""

    background: str
    objects: tuple[Seen, ...]


def read(picture: NDArray[np.uint8]) -> Reading:
    """Read a picture, uint8 [h, w, 3] with h and w of at least 16; ValueError for anything else."""
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or min(picture.shape[:2]) < 16:
        raise ValueError(f"The oracle reads uint8 [h, w, 3], h and w ≥ 16, not {picture.dtype} {picture.shape}.")
    pixels = np.ascontiguousarray(picture.transpose(2, 0, 1)).astype(np.float32)
    backdrop = _backdrop(pixels)
    objects = [_describe(pixels, backdrop, blob) for blob in _blobs(pixels, backdrop)]
    objects.sort(key=lambda one: -one.area)
    return Reading(_background(backdrop), tuple(objects))


def judge(picture: NDArray[np.uint8], expected: dict[str, Any]) -> dict[str, bool]:
    """Which of the expected attributes a picture shows.

    A single expects {"shape", "colour", "size", "background"} and is judged by its largest object: those four, "count"
    (exactly one object) and "all". A pair expects {"objects": [{"shape", "colour"}, …], "relation", "background"}:
      colours, shapes   the two largest objects have the two colours, the two shapes, whichever has which
      objects           each colour is bound to its own shape
      relation          the object that is the first one lies where the relation says, seen from the second
      count, background exactly two objects; the background's colour
      all               everything at once
    Which object is the first one is told by colour or, if the colours do not tell, by shape.
    """
    reading = read(picture)
    if "objects" in expected:
        truth = _judge_pair(reading, expected)
    else:
        seen = reading.objects[0] if reading.objects else None
        names = ("shape", "colour", "size")
        truth = {name: seen is not None and getattr(seen, name) == expected[name] for name in names}
        truth["count"] = len(reading.objects) == 1
    truth["background"] = reading.background == expected["background"]
    return {**truth, "all": all(truth.values())}


def _judge_pair(reading: Reading, expected: dict[str, Any]) -> dict[str, bool]:
    wanted = expected["objects"]
    truth = dict.fromkeys(("colours", "shapes", "objects", "relation"), False)
    truth["count"] = len(reading.objects) == 2
    if len(reading.objects) < 2:
        return truth
    for name, key in (("colours", "colour"), ("shapes", "shape")):
        truth[name] = sorted(getattr(o, key) for o in reading.objects[:2]) == sorted(one[key] for one in wanted)
    for order in permutations(reading.objects[:2]):
        by_colour = [seen.colour == one["colour"] for seen, one in zip(order, wanted, strict=True)]
        by_shape = [seen.shape == one["shape"] for seen, one in zip(order, wanted, strict=True)]
        truth["objects"] |= all(by_colour + by_shape)
        if all(by_colour) or (not truth["colours"] and all(by_shape)):
            truth["relation"] |= _relation(*order) == expected["relation"]
    return truth


def _relation(first: Seen, second: Seen) -> str:
    """Where `first` lies, seen from `second`: by the larger of the two offsets between their centres."""
    across, down = first.centre[0] - second.centre[0], first.centre[1] - second.centre[1]
    if abs(across) > abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


# Colour -------------------------------------------------------------------------------------------------------------


def _backdrop(pixels: Array) -> Array:
    """The background's colour [3]: the median of the picture's rim, which objects touch in few places at most."""
    rim = max(1, pixels.shape[1] // 32)
    strips = (pixels[:, :rim], pixels[:, -rim:], pixels[:, rim:-rim, :rim], pixels[:, rim:-rim, -rim:])
    return np.median(np.concatenate([strip.reshape(3, -1) for strip in strips], axis=1), axis=1)


def _background(colour: Array) -> str:
    hue, saturation, value = _hsv(colour)
    if float(colour.max() - colour.min()) < 32:
        return "black" if value < 0.25 else "white" if value > 0.86 else "gray" if 0.4 < value < 0.75 else UNCLEAR
    if value < 0.2:
        return "black"
    return "pink" if value > 0.85 and 0.12 < saturation < 0.4 and (hue > 315 or hue < 20) else UNCLEAR


def _hsv(colour: Array) -> tuple[float, float, float]:
    """RGB 0–255 → hue in degrees, saturation and value in 0–1."""
    red, green, blue = (float(channel) for channel in colour)
    high, low = max(red, green, blue), min(red, green, blue)
    spread = high - low
    if spread == 0:
        return 0.0, 0.0, high / 255
    if high == red:
        sixth = (green - blue) / spread
    elif high == green:
        sixth = 2 + (blue - red) / spread
    else:
        sixth = 4 + (red - green) / spread
    return 60 * sixth % 360, spread / high, high / 255


def _colour(colour: Array) -> str:
    hue, saturation, value = _hsv(colour)
    if saturation < OBJECT_SATURATION or value < OBJECT_VALUE:
        return UNCLEAR
    for name, (start, end) in HUES.items():
        if start <= hue < end or start <= hue + 360 < end:
            return name
    return UNCLEAR


# Objects ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Blob:
    """A window of the picture and the object's pixels in it; one pixel of margin where the picture has one."""

    window: tuple[slice, slice]
    mask: NDArray[np.bool_]


def _blobs(pixels: Array, backdrop: Array) -> list[_Blob]:
    """What stands out from the background, one blob an object; touching objects part by colour."""
    height, width = pixels.shape[1:]
    smallest = max(4, SMALLEST * height * width)
    difference = np.abs(pixels - backdrop[:, None, None])
    distance = np.maximum(np.maximum(difference[0], difference[1]), difference[2])
    whole_picture = _Blob((slice(0, height), slice(0, width)), distance > CONTRAST)
    blobs = []
    for rough in _components(whole_picture, smallest):
        # The edge lies half way between the colours of background and object, so look again for each object's contrast.
        nearby = distance[rough.window]
        fine = _Blob(rough.window, rough.mask & (nearby > 0.5 * float(np.median(nearby[rough.mask]))))
        for blob in _components(fine, smallest):
            blobs += _part(pixels[:, *blob.window], blob, smallest)
    return blobs


def _components(blob: _Blob, smallest: float) -> list[_Blob]:
    """The connected parts of a blob that have at least `smallest` pixels."""
    labels, _ = ndimage.label(blob.mask)
    sizes = np.bincount(labels.ravel())
    parts = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if sizes[label] >= smallest:
            down, across = (slice(max(0, s.start - 1), s.stop + 1) for s in box)
            mask = labels[down, across] == label
            top, left = blob.window[0].start + down.start, blob.window[1].start + across.start
            parts.append(_Blob((slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1])), mask))
    return parts


def _part(pixels: Array, blob: _Blob, smallest: float) -> list[_Blob]:
    """Split a blob of two colours in two; one whose second colour is only a fringe or a stain stays whole."""
    core = ndimage.binary_erosion(blob.mask)
    inside = pixels[:, core]
    if inside.shape[1] < 8:
        return [blob]
    first = np.median(inside, axis=1)
    second = inside[:, np.argmax(np.abs(inside - first[:, None]).sum(axis=0))]
    other = _nearer(inside, second, first)
    for _ in range(2):  # two means, begun with the typical colour and the one farthest from it
        if not 0.2 < other.mean() < 0.8:
            return [blob]
        first, second = inside[:, ~other].mean(axis=1), inside[:, other].mean(axis=1)
        other = _nearer(inside, second, first)
    names = _colour(first), _colour(second)
    if names[0] == names[1] or UNCLEAR in names:
        return [blob]
    side = _nearer(pixels, second, first)
    halves = [_Blob(blob.window, ndimage.binary_opening(blob.mask & half)) for half in (side, ~side)]
    parts = [part for half in halves for part in _components(half, smallest)]
    return parts if len(parts) > 1 else [blob]


def _nearer(pixels: Array, this: Array, that: Array) -> NDArray[np.bool_]:
    """Which of the pixels [3, …] are nearer to the colour `this` than to the colour `that`."""
    return np.tensordot(this - that, pixels, axes=1) > float((this - that) @ (this + that)) / 2


def _describe(pixels: Array, backdrop: Array, blob: _Blob) -> Seen:
    """Colour, shape, size and place of the object in a blob."""
    height, width = pixels.shape[1:]
    nearby = pixels[:, *blob.window]
    core = ndimage.binary_erosion(blob.mask, iterations=max(1, height // 64))
    colour = np.median(nearby[:, core if core.sum() >= 4 else blob.mask], axis=1)
    # How much of a pixel is the object's, 0–1, from the mix of the two colours; the edge's outer pixels included.
    direction = colour - backdrop
    share = np.tensordot(direction, nearby - backdrop[:, None, None], axes=1) / max(float(direction @ direction), 1.0)
    alpha = np.clip((share - 0.5) * SHARPEN + 0.5, 0, 1) * ndimage.binary_dilation(blob.mask)
    total = max(float(alpha.sum()), 1e-6)
    y, x = (np.arange(s.start, s.stop, dtype=np.float32) + 0.5 for s in blob.window)
    middle_x, middle_y = float(alpha.sum(axis=0) @ x) / total, float(alpha.sum(axis=1) @ y) / total
    across = sqrt(total / (height * width))
    size = next((name for name, (low, high) in WIDTHS.items() if low <= across < high), UNCLEAR)
    unit = sqrt(total)
    shape = _shape(alpha, ((x - middle_x) / unit)[None, :], ((y - middle_y) / unit)[:, None], 1 / unit)
    return Seen(shape, _colour(colour), size, (middle_x / width, middle_y / height), total / (height * width))


# Shape --------------------------------------------------------------------------------------------------------------


def _shape(alpha: Array, x: Array, y: Array, pixel: float) -> str:
    """The ideal outline of the same area and centre of mass that overlaps best, if it overlaps well.

    `x` and `y` are pixel middles about the centre of mass, in units in which the object's area is 1; `pixel` is a
    pixel's width in them.
    """
    overlaps = {}
    for name, depth in _depths(x, y):
        ideal = np.clip(0.5 - depth / pixel, 0, 1)
        overlaps[name] = float(np.minimum(alpha, ideal).sum() / np.maximum(alpha, ideal).sum())
    best = max(overlaps, key=lambda name: overlaps[name])
    return best if overlaps[best] >= OVERLAPS[best] else UNCLEAR


def _half_planes(x: Array, y: Array, count: int, first: float, inradius: float) -> list[Array]:
    """Signed distances to a regular polygon's half planes, negative inside; the angles go clockwise from up."""
    angles = [first + 2 * pi * n / count for n in range(count)]
    return [x * np.float32(sin(angle)) - y * np.float32(cos(angle)) - np.float32(inradius) for angle in angles]


def _depths(x: Array, y: Array) -> list[tuple[str, Array]]:
    """Signed distance to each ideal outline of area 1 about its centre of mass, negative inside."""
    low, middle, high = _half_planes(x, y, 3, pi / 3, sqrt(1 / (3 * sqrt(3))))  # area of a triangle: 3 √3 r²
    long, thick = np.float32(0.625), np.float32(0.25)  # a cross with arms two fifths as wide as it is long: 8 lt - 4 t²
    across, down = np.abs(x), np.abs(y)
    lying, standing = np.maximum(across - long, down - thick), np.maximum(across - thick, down - long)
    return [
        ("circle", np.hypot(x, y) - np.float32(sqrt(1 / pi))),
        ("square", np.maximum(np.abs(x), np.abs(y)) - np.float32(0.5)),
        ("triangle", np.maximum(np.maximum(low, middle), high)),
        ("cross", np.minimum(lying, standing)),
    ]
