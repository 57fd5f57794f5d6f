"""Whether a JPEG is complete, by its markers (ITU-T T.81, annex B), at a hundredth of what decoding costs.

A decoder gives up on a JPEG, or fills the rest with grey, where the bytes end before the end marker does. Damage within
a scan it paints over, as long as another marker follows. So whoever only wants to know whether the file is whole need
not decode it.
"""

from __future__ import annotations

import re

_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_FRAMES = {0xC0: False, 0xC1: False, 0xC2: True}
"""Markers of frames that are Huffman-coded, and whether they are progressive."""
_ALONE = {0x00, 0x01, 0xFF, *range(0xD0, 0xD9)}
"""Bytes after 0xFF that begin no segment with a length: stuffing, TEM, fill bytes, restarts, a start."""
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""The marker that ends a scan's data, in which 0xFF stands before 0x00 (stuffing), a restart or another 0xFF only."""


def is_complete(body: bytes) -> bool:
    """Whether segments and scans lead without a gap from the start marker over a frame's scans to the end marker.

    False says nothing: decoders forgive more than this reads. Of a frame that is not progressive the first scan must be
    the last thing before the end: it is decoded as it is read, and decoders differ in what they make of errors behind.
    """
    if body[:2] != bytes((0xFF, _START)):
        return False
    at, progressive, scanned = 2, None, False
    while body[at : at + 1] == b"\xff" and at + 1 < len(body):
        marker = body[at + 1]
        if marker == _END:
            return scanned
        length = int.from_bytes(body[at + 2 : at + 4], "big")
        if marker in _ALONE or length < 2 or at + 2 + length > len(body) or (scanned and not progressive):
            return False
        progressive = _FRAMES.get(marker, progressive)
        at += 2 + length
        if marker == _SCAN:
            after = _AFTER_SCAN.search(body, at)
            if after is None or progressive is None:
                return False
            at, scanned = after.start(), True
    return False
