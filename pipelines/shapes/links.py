"""The links of the shapes world, and what is wrong with some of them.

A URL says everything: `http://b.shapes.test/seed0-pairs30/000123.png` is picture 123 of the world of seed 0 with 30 %
pairs, on a made-up host. Its fault follows from that alone, so list and server agree without talking to each other.
"""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass, fields, replace

from infra.errors import Refused
from pipelines.shapes.world import Scene, caption, generator, scene_of

HOSTS = ("a.shapes.test", "b.shapes.test", "c.shapes.test", "d.shapes.test")


@dataclass(frozen=True)
class Faults:
    """The share of links with each fault. The first ten lose a row (11 % in all), the last three only take longer."""

    missing: float = 0.02  # 404
    gone: float = 0.01  # 410
    reset: float = 0.01  # the connection is reset before any answer
    truncated: float = 0.012  # half a picture: half of them with the whole one's Content-Length, half with their own
    tiny: float = 0.01  # 8 × 8 pixels
    duplicate: float = 0.015  # byte for byte the picture of an earlier link
    mismatched: float = 0.015  # a good picture; the list's caption tells of another one
    astray: float = 0.005  # a redirect to where no client should follow: loopback, a file, a cloud's metadata
    page: float = 0.01  # HTML instead of a picture, with status 200
    noai: float = 0.005  # X-Robots-Tag: noai
    slow: float = 0.02  # answers late
    flaky: float = 0.02  # 503 at the first attempt, fine from the second on
    moved: float = 0.01  # a redirect to another host of the world, where the picture is


FAULTS = Faults()
HARMLESS = ("slow", "flaky", "moved")
ASTRAY = ("http://127.0.0.1/secret.png", "file:///etc/passwd", "http://169.254.169.254/latest/meta-data/")

_PATH = re.compile(r"/seed(?P<seed>\d+)-pairs(?P<percent>\d+)(?P<clean>-clean)?/(?P<index>\d{6,})\.png")


@dataclass(frozen=True)
class Link:
    """A row's picture on the web: row `index` of the world of `seed` with `percent` % pairs, with or without faults."""

    seed: int
    percent: int
    index: int
    faulty: bool = True

    @property
    def path(self) -> str:
        return f"/seed{self.seed}-pairs{self.percent}{'' if self.faulty else '-clean'}/{self.index:06d}.png"

    @property
    def host(self) -> str:
        return HOSTS[int(generator("host", *astuple(self)).random() * len(HOSTS))]

    @property
    def url(self) -> str:
        return f"http://{self.host}{self.path}"

    @property
    def fault(self) -> str | None:
        """The name of the link's fault, a field of `Faults`, or None."""
        if not self.faulty:
            return None
        draw = generator("fault", *astuple(self)).random()
        for field in fields(FAULTS):
            draw -= getattr(FAULTS, field.name)
            if draw < 0:
                return field.name
        return None

    @property
    def variant(self) -> float:
        """A second draw in [0, 1): which kind of a fault, how late."""
        return generator("variant", *astuple(self)).random()

    @property
    def shown(self) -> Link:
        """The link whose picture is served: itself, or for a duplicate an earlier one without fault."""
        if self.fault != "duplicate":
            return self
        for index in range(int(self.variant * self.index), -1, -1):
            earlier = replace(self, index=index)
            if index < self.index and earlier.fault is None:
                return earlier
        return self

    @property
    def scene(self) -> Scene:
        """What its picture shows; never a held-out scene."""
        shown = self.shown
        return scene_of(shown.index, shown.seed, shown.percent / 100)[0]

    @property
    def caption(self) -> str:
        """What the list says about it: the scene, except where the fault is that it does not."""
        if self.fault == "mismatched":
            rng = generator("mismatched", *astuple(self))
            while (other := scene_of(int(rng.random() * 2**40), self.seed, self.percent / 100)[0]) == self.scene:
                continue
            return caption(other, rng)
        if self.fault == "duplicate":
            return caption(self.scene, generator("duplicate", *astuple(self)))
        return scene_of(self.index, self.seed, self.percent / 100)[1]


def parse_path(path: str) -> Link | None:
    """The link that a URL's path names, or None."""
    found = _PATH.fullmatch(path)
    if found is None or int(found["percent"]) > 100:
        return None
    return Link(int(found["seed"]), int(found["percent"]), int(found["index"]), found["clean"] is None)


def percent_of(pairs: float) -> int:
    """A share of pairs as the whole percentage that stands in a URL."""
    percent = round(100 * pairs)
    if not 0 <= percent <= 100 or abs(100 * pairs - percent) > 1e-9:
        raise Refused(f"The share of pairs is a whole percentage between 0 and 1, such as 0.3, not {pairs!r}.")
    return percent
