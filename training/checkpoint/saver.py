"""Saves checkpoints beside training: the loop waits for the rest of a copy at most; a thread writes.

The state is copied (staged) while the next micro-batches are computed, which do not change it; before the weights
change, the loop waits for the copy. It is written while training goes on. A second save waits for the first.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from training.checkpoint.files import put_tensors
from training.checkpoint.store import Checkpoints, Part, Stored
from training.parallel import Group

ONE = "00000-of-00001.safetensors"
"""The file of a single worker."""


class Saver:
    """Writes checkpoints in the background, one at a time: `with Saver(...) as saver`. Every rank has one, and they
    save at the same steps.

    It keeps a copy of the state on the host (pinned, where the state is on a GPU). overlap False waits for each
    checkpoint instead, which is what the benchmark measures against.
    """

    def __init__(self, checkpoints: Checkpoints, group: Group, *, overlap: bool = True) -> None:
        self._checkpoints, self._ranks, self._overlap = checkpoints, group.ranks, overlap
        self._staged: Future[None] | None = None
        self._written: Future[None] | None = None
        self._copies: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        # Collectives of its own: those of training go on meanwhile.
        self._peers: Any = torch.distributed.new_group(backend="gloo") if group.ranks > 1 else None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *raised: object) -> None:
        """Lets what is being written end, whatever comes of it: who wants to know has waited."""
        self._threads.shutdown()

    def save(self, samples: int, state: dict[str, Tensor], head: dict[str, Any]) -> None:
        """Begins a checkpoint of these tensors, once the one before is written; raises what that one met with."""
        self.wait()
        self._staged = Future()
        self._written = self._threads.submit(self._save, samples, state, head, self._staged, self._after())
        if not self._overlap:
            self.wait()

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is on its way."""
        return self._written is not None and not self._written.done()

    def before_update(self) -> None:
        """Waits until nothing is copied any more of what an update changes."""
        staged, self._staged = self._staged, None
        if staged is not None:
            staged.result()

    def wait(self) -> None:
        """Waits until all is written; raises what it met with, Refused where the store would not take it."""
        self.before_update()
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def _after(self) -> AbstractContextManager[Any]:
        """Where copies are made: on a stream of their own, behind what the GPU was told to do so far."""
        if not torch.cuda.is_available():
            return nullcontext()
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def _save(
        self,
        samples: int,
        state: dict[str, Tensor],
        head: dict[str, Any],
        staged: Future[None],
        stream: AbstractContextManager[Any],
    ) -> None:
        try:
            with torch.no_grad(), stream:
                copies = {name: self._copy(name, tensor) for name, tensor in state.items()}
                if self._stream is not None:
                    self._stream.synchronize()
        except BaseException as error:
            staged.set_exception(error)
            raise
        staged.set_result(None)
        if self._ranks > 1:
            from training.checkpoint.dcp import save_dcp

            return save_dcp(self._checkpoints, samples, copies, head, self._peers)
        if written := put_tensors(self._checkpoints, samples, ONE, copies):
            tensors = {name: _whole(name, tensor) for name, tensor in copies.items()}
            self._checkpoints.commit(samples, head, [written], tensors)

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, or this rank's shard of it, on the host; the copy's memory serves the next save again."""
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if name not in self._copies:
            self._copies[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        self._copies[name].copy_(local, non_blocking=True)
        if local is tensor:
            return self._copies[name]
        from training.parallel import as_dtensor

        return as_dtensor(self._copies[name], tensor)


def _whole(name: str, tensor: Tensor) -> Stored:
    shape = tuple(tensor.shape)
    return Stored(str(tensor.dtype).removeprefix("torch."), shape, (Part(ONE, name, (0,) * len(shape), shape),))
