"""Work ahead of a model: in order, bounded, and nothing is lost of what it raises."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.embed.prefetch import DeviceCopier, prefetched
from tests.gpu.check_embed import LEAST, check


@settings(max_examples=30, deadline=None)
@given(count=st.integers(0, 40), threads=st.integers(1, 6), most=st.integers(1, 12))
def test_results_come_in_the_items_order_whoever_is_fast(count, threads, most):
    with prefetched(lambda n: (time.sleep(n % 3 / 2000), n * n)[1], range(count), threads, most) as results:
        assert list(results) == [n * n for n in range(count)]


@settings(max_examples=20, deadline=None)
@given(threads=st.integers(1, 6), most=st.integers(1, 12))
def test_no_more_than_most_items_are_begun_before_they_are_taken(threads, most):
    begun = 0
    lock = threading.Lock()

    def work(item: int) -> int:
        nonlocal begun
        with lock:
            begun += 1
        return item

    with prefetched(work, range(40), threads, most) as results:
        for taken, _ in enumerate(results, start=1):
            assert begun <= taken - 1 + most


def test_it_begins_before_anything_is_asked_for():
    began = threading.Event()
    with prefetched(lambda _: began.set(), [0], 1, 1):
        assert began.wait(5)


def test_an_error_is_raised_where_its_result_is_taken():
    with prefetched(lambda n: 1 // n, [1, 0, 1], 2, 3) as results:
        assert next(results) == 1
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_leaving_early_begins_nothing_more():
    seen = []
    with prefetched(seen.append, range(1000), 1, 4) as results:
        next(results)
    assert len(seen) <= 5


def test_threads_ahead_take_no_torch_threads_from_the_model():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with prefetched(lambda _: torch.get_num_threads(), range(4), 2, 4) as results:
            assert list(results) == [1] * 4
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_lane_on_the_cpu_joins_and_gives_back():
    lane = DeviceCopier(torch.device("cpu"))
    parts = [torch.rand(1, 3), torch.rand(2, 3)]
    sent = lane.send(parts)
    assert torch.equal(sent, torch.cat(parts))
    assert torch.equal(lane.fetch(sent)(), sent)


def test_lower_precisions_and_cut_captions_keep_their_directions_on_the_way_to_a_device():
    for told in check(torch.device("cpu"), batch=4, batches=3, layers=2, width=128).values():
        assert min(told["cosine"], told["cut"]) >= LEAST
