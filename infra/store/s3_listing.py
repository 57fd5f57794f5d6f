"""A long listing of S3, many pages of it at a time.

A page says where the next one begins, so that asked for one behind the other, ten pages take ten times as long as one.
But names that are digests are spread evenly: how far the first page got tells where the others will begin.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PAGE = 1000
"""Names of a page: the most that S3 gives."""
AT_ONCE = 16
DIGITS = 8
"""Hex digits that a name is placed by."""
SHARE = 0.95
"""Of a page's names that are planned for each further one, so that few need another."""
MOST = 10_000
"""Spans that are planned; where these are longer than a page, each takes several."""

Span = tuple[str, str | None]
"""Keys behind the first, up to and with the second; None: to the end."""


def list_objects(client: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """What S3 says of each object whose key has that prefix, in the order of keys."""
    page = client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=PAGE)
    there = page.get("Contents", [])
    yield from there
    if not page["IsTruncated"]:
        return

    def within(span: Span) -> list[dict[str, Any]]:
        after, end = span
        found = list[dict[str, Any]]()
        pages = client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket, Prefix=prefix, StartAfter=after, MaxKeys=PAGE):
            keys = page.get("Contents", [])
            found += [one for one in keys if end is None or one["Key"] <= end]
            if keys and end is not None and keys[-1]["Key"] > end:
                break
        return found

    rest = iter(spans(prefix, there[-1]["Key"]))
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="list") as pool:
        while some := list(itertools.islice(rest, AT_ONCE)):
            yield from itertools.chain.from_iterable(pool.map(within, some))


def spans(prefix: str, last: str) -> list[Span]:
    """Spans that hold, in order, all keys behind the last one of a first page, whatever these are; of about a page
    each, where all begin with a digest behind the prefix. A single one, where that last key does not."""
    name = last[len(prefix) :]
    if not re.match("[0-9a-f]{64}", name):  # such as numbers in a row, which would be taken for the first of a billion
        return [(last, None)]
    whole, seen = 16**DIGITS, int(name[:DIGITS], 16) + 1
    width = max(int(seen * SHARE), whole // MOST)
    bounds = [f"{prefix}{place:0{DIGITS}x}" for place in range(seen + width, whole, width)]
    return list(zip([last, *bounds], [*bounds, None], strict=True))
