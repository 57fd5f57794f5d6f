"""Saving while the model trains: the loop stands still for the copy at most, the rest is a thread's.

A copy of the state (staging) is taken while the next micro-batches are computed, which do not change it; before the
weights change, the loop waits for it. Then it is written while training goes on. A second save waits for the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from infra.errors import Refused
from training.checkpoint import Checkpoints, Part, Stored, Written
from training.parallel import Group

ONE = "00000-of-00001.safetensors"
"""The file of a single worker."""


class Saver:
    """Writes checkpoints in the background. Every rank has one, and they save at the same steps.

    `overlap` False waits for each checkpoint instead, as the measure of what it saves.
    """

    def __init__(self, checkpoints: Checkpoints, group: Group, *, overlap: bool = True) -> None:
        self._checkpoints, self._ranks, self._overlap = checkpoints, group.ranks, overlap
        self._staged: Future[Any] | None = None
        self._written: Future[Any] | None = None
        self._stager: Any = None
        self._copies: dict[str, Tensor] = {}
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        # Collectives of its own: those of training go on meanwhile.
        self._peers = torch.distributed.new_group(backend="gloo") if group.ranks > 1 else None

    def save(self, samples: int, state: dict[str, Tensor], head: dict[str, Any]) -> None:
        """Begins a checkpoint of these tensors, once the one before is written; raises what that met with."""
        self.wait()
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # the copy is made on a stream of its own
        if self._ranks > 1:
            self._save_together(samples, state, head)
        else:
            self._staged = Future()
            self._written = self._threads.submit(self._save_alone, samples, state, head, self._staged)
        if not self._overlap:
            self.wait()

    def before_update(self) -> None:
        """Waits until nothing is copied any more from what an update changes."""
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    def wait(self) -> None:
        """Waits until all is written; raises Refused where it could not be."""
        self.before_update()
        written, self._written = self._written, None
        if written is None:
            return
        if self._ranks == 1:
            return written.result()
        from training.dcp import CheckpointException, why

        try:
            written.result()
        except CheckpointException as error:
            raise Refused(f"a checkpoint could not be written: {why(error)}", code=5) from error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *raised: object) -> None:
        """Lets what is being written end, whatever comes of it: who wants to know has waited."""
        for pending in (self._staged, self._written):
            if pending is not None:
                pending.exception(timeout=60)
        if self._stager is not None:
            self._stager.close()
        self._threads.shutdown()

    def _save_alone(self, samples: int, state: dict[str, Tensor], head: dict[str, Any], staged: Future[Any]) -> None:
        try:
            for name, tensor in state.items():
                if name not in self._copies:
                    self._copies[name] = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
                self._copies[name].copy_(tensor)
        except BaseException as error:
            staged.set_exception(error)
            raise
        staged.set_result(None)
        if written := put_tensors(self._checkpoints, samples, ONE, self._copies):
            tensors = {name: _whole(name, tensor) for name, tensor in self._copies.items()}
            self._checkpoints.commit(samples, head, [written], tensors)

    def _save_together(self, samples: int, state: dict[str, Tensor], head: dict[str, Any]) -> None:
        from torch.distributed.checkpoint import async_save
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        from training.dcp import Writer

        if self._stager is None:
            cuda = torch.cuda.is_available()
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=cuda
                )
            )
        begun = async_save(
            dict(state),
            storage_writer=Writer(self._checkpoints, samples, head),
            async_stager=self._stager,
            process_group=self._peers,
        )
        self._staged, self._written = begun.staging_completion, begun.upload_completion  # type: ignore[union-attr]


def put_tensors(checkpoints: Checkpoints, samples: int, name: str, tensors: Mapping[str, Tensor]) -> Written | None:
    """Puts a safetensors file of a checkpoint; None as `Checkpoints.put`."""
    from safetensors.torch import save_file

    with checkpoints.store.scratch() as folder:
        save_file({key: tensors[key] for key in sorted(tensors)}, folder / name)
        return checkpoints.put(samples, name, folder / name)


def _whole(name: str, tensor: Tensor) -> Stored:
    shape = tuple(tensor.shape)
    return Stored(str(tensor.dtype).removeprefix("torch."), shape, (Part(ONE, name, (0,) * len(shape), shape),))
