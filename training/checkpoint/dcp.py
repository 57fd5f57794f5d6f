"""torch.distributed.checkpoint over the store: who writes which tensor, and who reads which part of which file.

Its planners decide (what all ranks have is written once, in turns; a shard is written by its rank; whatever number of
ranks and kind of sharding reads gets just its boxes). What lies in the store is safetensors and one JSON manifest, so
that nothing is unpickled. One worker writes the same format without it: its import takes about as long as torch's.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import load as torch_load
from torch.distributed.checkpoint import save as torch_save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from infra.errors import Refused
from training.checkpoint.files import put_tensors
from training.checkpoint.store import Checkpoint, Checkpoints, Part, Stored, Written


def save_dcp(
    checkpoints: Checkpoints,
    samples: int,
    state: dict[str, Tensor],
    head: dict[str, Any],
    peers: torch.distributed.ProcessGroup | None,
) -> None:
    """Writes a checkpoint of all ranks of `peers`, each of which calls it. Raises Refused where one could not."""
    try:
        torch_save(dict(state), storage_writer=Writer(checkpoints, samples, head), process_group=peers)
    except CheckpointException as error:
        raise Refused(f"a checkpoint could not be written: {_why(error)}", code=5) from error


def load_dcp(checkpoint: Checkpoint, state: dict[str, Tensor]) -> None:
    """Reads a checkpoint into tensors that are there, by name: each rank the boxes that it has of them, on its own.

    Raises Refused where the checkpoint lacks one, or has it in another shape.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it takes this for a single process
            torch_load(dict(state), storage_reader=Reader(checkpoint), no_dist=True)
    except CheckpointException as error:
        raise Refused(f"checkpoint {checkpoint.place} does not fit this model: {_why(error)}", code=5) from error


class Writer(StorageWriter):
    """Each rank puts one file; then rank 0 commits the manifest."""

    def __init__(self, checkpoints: Checkpoints, samples: int, head: dict[str, Any]) -> None:
        self._checkpoints, self._samples, self._head = checkpoints, samples, head

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Places are made of samples and lease, never given."""
        return False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tells each rank the name of its file."""
        return [
            replace(plan, storage_data=f"{rank:05d}-of-{len(plans):05d}.safetensors") for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's boxes into one file."""
        boxes = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        written: Written | None = Written("", "", 0)
        if boxes:
            tensors = {name: box for name, box in boxes.items() if isinstance(box, Tensor)}
            written = put_tensors(self._checkpoints, self._samples, plan.storage_data, tensors)
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, 0, written) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commits, on rank 0, if every rank could write."""
        lies = {result.index: result.storage_data for of_rank in results for result in of_rank}
        if not all(lies.values()):
            return
        tensors = {}
        for name, about in metadata.state_dict_metadata.items():
            assert isinstance(about, TensorStorageMetadata)
            parts = tuple(
                Part(lies[MetadataIndex(name, chunk.offsets)].name, name, tuple(chunk.offsets), tuple(chunk.sizes))
                for chunk in about.chunks
            )
            tensors[name] = Stored(str(about.properties.dtype).removeprefix("torch."), tuple(about.size), parts)
        files = list(dict.fromkeys(lies.values()))
        self._checkpoints.commit(self._samples, self._head, files, tensors)


class Reader(StorageReader):
    """The tensors of a checkpoint that was found intact."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._parts: dict[MetadataIndex, Part] = {}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Checkpoints are found by `Checkpoints`, never given by name."""
        return False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A reader reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the manifest says of the tensors."""
        described, self._parts = {}, {}
        for name, stored in self._checkpoint.tensors.items():
            chunks = []
            for part in stored.parts:
                chunks.append(ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes)))
                self._parts[MetadataIndex(name, chunks[-1].offsets)] = part
            properties = TensorProperties(dtype=getattr(torch, stored.dtype))
            described[name] = TensorStorageMetadata(properties, torch.Size(stored.shape), chunks)
        return Metadata(described)  # type: ignore[arg-type]

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads the boxes that are asked for, file by file, and nothing else."""
        by_file: dict[Path, list[Any]] = defaultdict(list)
        for item in plan.items:
            by_file[self._checkpoint.files[self._parts[item.storage_index].file]].append(item)
        for path, items in by_file.items():
            with safe_open(path, framework="pt") as file:
                for item in items:
                    key = self._parts[item.storage_index].key
                    box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                    part = file.get_slice(key)[box] if box else file.get_tensor(key)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _why(error: CheckpointException) -> str:
    """What went wrong, each way once."""
    return "; ".join(dict.fromkeys(f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()))
