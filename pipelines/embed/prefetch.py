"""Work ahead of a model: what threads prepare while it computes, and copies to and from its device beside it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def prefetched(work: Callable[[T], R], items: Iterable[T], threads: int, most: int) -> Iterator[Iterator[R]]:
    """`work` of each item, in the items' order, by so many threads; it begins at once.

    At most `most` items are worked on or wait to be taken, so memory does not grow with their number. What `work`
    raises is raised where its result is taken. Leaving the context begins no more of them.
    """
    import torch

    left = iter(items)
    # One torch thread each: they are the parallelism, and each would start a pool of its own beside the model's.
    pool = ThreadPoolExecutor(threads, "ahead", torch.set_num_threads, (1,))
    due: deque[Future[R]] = deque(pool.submit(work, item) for item in islice(left, most))

    def taken() -> Iterator[R]:
        while due:
            yield due.popleft().result()
            due.extend(pool.submit(work, item) for item in islice(left, 1))

    try:
        yield taken()
    finally:
        pool.shutdown(cancel_futures=True)


class DeviceCopier:
    """The way to a device and back. On a GPU nothing on it waits for the model: copies run on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, parts: Sequence[Tensor]) -> Tensor:
        """Parts [n, …], joined to one tensor, on the device."""
        import torch

        if self._stream is None:
            return torch.cat(list(parts))
        rows = sum(len(part) for part in parts)
        # Only from pinned memory does a copy run beside the program; torch lends the same pages again and again.
        pinned = torch.empty((rows, *parts[0].shape[1:]), dtype=parts[0].dtype, pin_memory=True)
        torch.cat(list(parts), out=pinned)
        with torch.cuda.stream(self._stream):
            there = pinned.to(self._device, non_blocking=True)
        model = torch.cuda.current_stream(self._device)
        model.wait_stream(self._stream)
        there.record_stream(model)
        return there

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Asks for a tensor of the device; what is returned waits for it, and for nothing that is asked for later."""
        import torch

        if self._stream is None:
            return lambda: tensor
        here = tensor.to("cpu", non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._device))

        def wait() -> Tensor:
            done.synchronize()
            return here

        return wait
