"""A long listing names everything once and in order, and its pages are asked for at once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.documents import digest
from infra.store import s3_listing as listing
from infra.store.opening import open_store
from infra.store.s3_listing import spans
from tests.fixtures.faulty_s3 import Request, failing

DIGESTS = st.integers(0, 2**32 - 1).map(lambda begins: f"records/{begins:08x}{0:056x}")
KEYS = st.one_of(DIGESTS, st.text(max_size=9).map("records/{}".format))


@settings(deadline=None, max_examples=60)
@given(KEYS, st.lists(KEYS, max_size=20))
def test_every_key_behind_the_first_page_is_in_one_span(last: str, keys: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(listing, "MOST", 50)
        made = spans("records/", last)
    assert made[0][0] == last
    assert made[-1][1] is None
    assert all(before[1] == after[0] for before, after in pairwise(made))
    assert all(end is None or start < end for start, end in made)
    for key in keys:
        assert sum(start < key and (end is None or key <= end) for start, end in made) == (key > last)


def test_spans_of_digests_are_of_about_a_page() -> None:
    names = sorted(digest(str(number).encode()) for number in range(10_000))
    made = spans("", names[listing.PAGE - 1])
    counts = [sum(start < name and (end is None or name <= end) for name in names) for start, end in made]
    assert sum(counts) == 10_000 - listing.PAGE
    assert len(made) <= 11
    assert sum(count > listing.PAGE for count in counts) <= 2


def test_numbers_in_a_row_are_not_taken_for_digests() -> None:
    assert spans("leases/work/", "leases/work/00001000.json") == [("leases/work/00001000.json", None)]


CASES = [("g", ()), ("g", ("~", "Z", "0", "g/1")), ("8", ("~",))]


@pytest.mark.parametrize(("below", "others"), CASES, ids=["digests", "others among them", "none in the upper half"])
def test_a_long_listing_is_sorted_and_whole_and_asks_for_many_pages_at_once(
    s3_endpoint: str, s3_uri: str, monkeypatch: pytest.MonkeyPatch, below: str, others: tuple[str, ...]
) -> None:
    digests = [digest(str(number).encode()) for number in range(160)]
    names = sorted([name for name in digests if name < below] + list(others))
    store = open_store(s3_uri)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda name: store.put_new(f"records/{name}", b""), names))
    monkeypatch.setattr(listing, "PAGE", 10)
    begun: list[float] = []

    def slow(request: Request) -> None:
        if "list-type=2" in request.path:
            begun.append(time.monotonic())
            time.sleep(0.2)

    with failing(s3_endpoint, slow) as proxy:
        there = open_store(s3_uri, create=False, endpoint=proxy.endpoint)
        assert [entry.name for entry in there.list("records/")] == [f"records/{name}" for name in names]
    if not others:  # "0" is no digest, and no page behind it can be foreseen
        assert max(sum(0 <= one - first < 0.2 for one in begun) for first in begun) > 4
