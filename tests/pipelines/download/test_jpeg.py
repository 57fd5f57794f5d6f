"""A JPEG's end found by its markers, against what Pillow and OpenCV make of the whole of it."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.download import images as pictures
from pipelines.download.images import PictureSpec, prepare_picture
from pipelines.download.jpeg import is_complete

KINDS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 4},
    "optimised": {"optimize": True, "quality": 30},
    "commented": {"comment": b"\xff\xd9 inside a segment", "exif": Image.Exif()},
}


def jpeg(kind: str, mode: str = "RGB") -> bytes:
    """A JPEG of noise and of smooth parts."""
    pixels = np.random.default_rng(1).integers(0, 255, (48, 64, 3), np.uint8)
    pixels[:24] //= 40
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", **KINDS[kind])
    return out.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_pictures_are_seen_to_be_whole_and_what_is_cut_never_is(kind, mode):
    whole = jpeg(kind, mode)
    assert is_complete(whole)
    assert is_complete(whole + b"what a camera or a trickster puts behind")
    assert not any(is_complete(whole[:length]) for length in range(len(whole)))


@pytest.mark.parametrize(
    "body", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"\xff\xd8\xff\xda\x00\x02\xff\xd9"[:6]]
)
def test_what_has_no_picture_in_it_is_not_whole(body):
    assert not is_complete(body)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_judged_as_by_decoding_twice(kind, monkeypatch):
    """Bytes changed, cut out, doubled or put in: the same state and pixels as when Pillow decodes all of it."""
    rng, whole, spec = random.Random(kind), jpeg(kind), PictureSpec(size=32, format="png")
    damaged = []
    for _ in range(150):
        body = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at, size = rng.randrange(len(body)), rng.randint(1, 40)
            new = rng.choice(
                [rng.randbytes(1), b"", body[at : at + size] * 2, b"\xff\xd9", b"\xff\xff", rng.randbytes(9)]
            )
            body[at : at + (size if not new or rng.random() < 0.3 else len(new))] = new
        damaged.append(bytes(body))
    quick = [prepare_picture(body, spec) for body in damaged]
    taken = sum(is_complete(body) for body in damaged)
    monkeypatch.setattr(pictures, "is_complete", lambda body: False)
    assert quick == [prepare_picture(body, spec) for body in damaged]
    assert 20 < taken < 150
