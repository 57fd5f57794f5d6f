"""Rules about the picture itself, and what is measured of a picture for them.

Sides are known from the index. What needs pixels is measured once for all rules of a section, picture by picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.download import picture
from pipelines.select.rules.base import DEVIATION, PHASH, BaseRule, numbers
from unclip.config import SIDE, Range

if TYPE_CHECKING:
    from PIL.Image import Image

_HASHED = 32  # pixels of the side that a picture is brought down to for its hash
_LOW = 8  # lowest frequencies of each axis that are hashed


@dataclass(frozen=True, kw_only=True)
class Size(BaseRule):
    """Rejects pictures whose original has a shorter side below `min_side` pixels."""

    min_side: int
    """Pixels of the shorter side, at least."""
    rule: Literal["size"] = "size"
    columns: ClassVar[tuple[str, ...]] = ("width", "height")
    bounds: ClassVar[Mapping[str, Range]] = {"min_side": SIDE}

    def features(self, rows: pa.Table) -> pa.Table:
        return pa.table({"side": pc.min_element_wise(rows["width"], rows["height"])})

    def reject(self, looks: Iterable[pa.Table]) -> Iterator[np.ndarray]:
        for look in looks:
            yield numbers(look, "side") < self.min_side


@dataclass(frozen=True, kw_only=True)
class Aspect(BaseRule):
    """Rejects pictures whose original is more than `max_ratio` times as long as it is wide, or the other way round."""

    max_ratio: float
    """Longer side over shorter side, at most."""
    rule: Literal["aspect"] = "aspect"
    columns: ClassVar[tuple[str, ...]] = ("width", "height")
    bounds: ClassVar[Mapping[str, Range]] = {"max_ratio": Range(1)}

    def features(self, rows: pa.Table) -> pa.Table:
        longer = pc.max_element_wise(rows["width"], rows["height"]).cast(pa.float64())
        return pa.table({"ratio": pc.divide(longer, pc.min_element_wise(rows["width"], rows["height"]))})

    def reject(self, looks: Iterable[pa.Table]) -> Iterator[np.ndarray]:
        for look in looks:
            yield numbers(look, "ratio") > self.max_ratio


@dataclass(frozen=True, kw_only=True)
class Blank(BaseRule):
    """Rejects pictures of (nearly) one colour: placeholders, scans of nothing, "image removed".

    Measured is the standard deviation of each colour channel over the picture, and the largest of the three counts.
    """

    min_deviation: float = 2.0
    """Standard deviation of the most varied channel, at least; channels go from 0 to 255."""
    rule: Literal["blank"] = "blank"
    columns: ClassVar[tuple[str, ...]] = (DEVIATION,)
    bounds: ClassVar[Mapping[str, Range]] = {"min_deviation": Range(0, 127.5)}

    def features(self, rows: pa.Table) -> pa.Table:
        return pa.table({"deviation": rows[DEVIATION]})

    def reject(self, looks: Iterable[pa.Table]) -> Iterator[np.ndarray]:
        for look in looks:
            yield numbers(look, "deviation") < self.min_deviation


def phash(image: Image) -> int:
    """The perceptual hash of a picture, 64 bits: near pictures differ in few of them, whatever their size or encoding.

    Grey, brought down to 32 × 32, DCT-II; a bit says which of the 8 × 8 lowest frequencies lies above their median
    (Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1). Row by row, the
    first bit is the highest.
    """
    import scipy.fft
    from PIL.Image import Resampling

    grey = np.asarray(image.convert("L").resize((_HASHED, _HASHED), Resampling.LANCZOS), np.float64)
    low = scipy.fft.dctn(grey)[:_LOW, :_LOW]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def deviation(image: Image) -> float:
    """Standard deviation over the pixels of the colour channel where it is largest, 0 … 127.5."""
    from PIL import ImageStat

    return max(ImageStat.Stat(image.convert("RGB")).stddev)


MEASURES: dict[str, tuple[pa.DataType, Callable[[Image], Any]]] = {
    PHASH: (pa.uint64(), phash),
    DEVIATION: (pa.float32(), deviation),
}
"""Column → its type, and how it is measured of a picture."""


def measured(rows: pa.Table, pictures: BinaryIO, wanted: Sequence[str]) -> pa.Table:
    """Rows with the wanted columns of MEASURES appended; null where the picture cannot be decoded.

    rows: with offset and length of each picture in the tar `pictures`. One picture is in memory at a time, and each is
    decoded once.
    """
    values: dict[str, list[Any]] = {name: [] for name in wanted}
    for offset, length in zip(rows["offset"].to_pylist(), rows["length"].to_pylist(), strict=True):
        image = picture(pictures, offset, length)
        for name, column in values.items():
            column.append(None if image is None else MEASURES[name][1](image))
    for name, column in values.items():
        rows = rows.append_column(name, pa.array(column, MEASURES[name][0]))
    return rows
