"""Blocks → batches: finds the rows that a selection keeps, reads and decodes them.

A block is read and decoded whole, and CLIP reads its captions whole, whichever of its rows are wanted first: so the
values of a row depend on nothing but its block, neither on the cache nor on the number of workers. Everything is
joined by uid, never by position.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from infra.errors import Refused
from infra.manifest import Manifest, Record, object_name
from infra.store import Store
from training.labels import Labels, Reader, labelled

Wanted = Callable[[pa.Array], np.ndarray]
"""uids [n] → bool [n], which rows are wanted."""
Decode = Callable[[bytes, bytes], np.ndarray]
"""(encoded picture, uid) → uint8 [3, s, s], of one size for all rows."""
ReadText = Callable[[Sequence[str]], dict[str, Tensor]]
"""Captions → named tensors [n, ...]: text_embedding, text_states and text_mask, or tokens."""


@dataclass
class Batch:
    """A micro-batch. `tensors`, each [b, ...]: image uint8 [b, 3, s, s], image_embedding and text_embedding [b, d] raw,
    text_states [b, L, w], text_mask [b, L], or tokens int64 [b, L], labels int64 [b, labels], as far as the objective
    reads them."""

    seed: int
    """Seed of this micro-batch's noise, timesteps, drops and crops."""
    uids: list[bytes]
    captions: list[str]
    tensors: dict[str, Tensor]
    parts: tuple[tuple[int, int], ...] = ()
    """(seed, samples) of each micro-batch that was joined to this one, if it was made so."""
    _generators: list[torch.Generator] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.uids)

    @property
    def generator(self) -> torch.Generator:
        """The source of this micro-batch's randomness, on the CPU so that every device draws the same."""
        return self.generators[0][0]

    @property
    def generators(self) -> list[tuple[torch.Generator, int]]:
        """The generator of each micro-batch in here, and its samples: what a sample draws of its own one does not
        depend on which others a worker joined it with."""
        parts = self.parts or ((self.seed, len(self)),)
        if self._generators is None:
            self._generators = [torch.Generator().manual_seed(seed) for seed, _ in parts]
        return [(generator, count) for generator, (_, count) in zip(self._generators, parts, strict=True)]

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on a device."""
        if device.type == "cpu":
            return self
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return Batch(self.seed, self.uids, self.captions, moved, self.parts)

    @classmethod
    def joined(cls, batches: Sequence[Batch]) -> Batch:
        """Several micro-batches as one; the first one's seed."""
        if len(batches) == 1:
            return batches[0]
        names = batches[0].tensors
        return cls(
            batches[0].seed,
            [uid for batch in batches for uid in batch.uids],
            [caption for batch in batches for caption in batch.captions],
            {name: torch.cat([batch.tensors[name] for batch in batches]) for name in names},
            tuple((batch.seed, len(batch)) for batch in batches),
        )


@dataclass(frozen=True)
class Place:
    """Where the kept rows of a block are: rows `first + keep` of a Parquet file; tar and index hold the pictures."""

    parquet: str
    """SHA-256 of the file that the block is a range of: rows.parquet of embed, or index.parquet of download."""
    first: int
    rows: int
    keep: np.ndarray
    """Kept rows, counted from `first`; int64 [k]."""
    tar: str
    index: str


@dataclass(frozen=True)
class Reads:
    """What an objective wants of each row."""

    image: Decode | None = None
    """How its encoded picture becomes pixels; None for no pictures."""
    originals: bool = False
    """Pictures of the tars (any size), in place of the base pictures beside the embeddings."""
    embeddings: bool = False
    """CLIP's image embeddings."""
    text_embeddings: bool = False
    """CLIP's text embeddings, as embed stored them."""
    labels: Labels | None = None
    """Label columns; rows that have none of them are left out."""
    text: bool = False
    """CLIP's view of the captions: needs `read_text`."""


@dataclass
class Rows:
    """The kept rows of one block, decoded: uids and captions [k], tensors [k, ...]."""

    uids: list[bytes]
    captions: list[str]
    tensors: dict[str, Tensor]

    @property
    def bytes(self) -> int:
        """Memory that it holds, roughly."""
        return sum(tensor.nbytes for tensor in self.tensors.values()) + 200 * len(self.uids)


class Data:
    """The rows that a job trains on.

    rows and selection are versions of embed's and curate's manifests, or of download's and filter's.
    """

    def __init__(
        self,
        store: Store,
        rows: str,
        selection: str,
        reads: Reads,
        *,
        read_text: ReadText | None = None,
        cache: int = 0,
        wanted: Wanted | None = None,
    ) -> None:
        self.store, self.reads, self.read_text = store, reads, read_text
        self._versions = rows, selection
        selections = {
            name: file.sha256
            for record in Manifest.load(store, selection).records
            for name, file in record.files.items()
        }
        self.places = [
            place
            for record in Manifest.load(store, rows).records
            for place in _places(store, record, selections, reads.labels, wanted)
        ]
        self._limit = cache
        self._cached: OrderedDict[int, Rows] = OrderedDict()
        self._held = 0
        self._index = lru_cache(maxsize=8)(self._read_index)
        self._labels = lru_cache(maxsize=8)(lambda index: Reader(store, index, reads.labels or Labels(())))

    @property
    def counts(self) -> tuple[int, ...]:
        """Kept rows of each block, for `Order`."""
        return tuple(len(place.keep) for place in self.places)

    def where(self, wanted: Wanted) -> Data:
        """The same data without the rows that are not wanted."""
        rows, selection = self._versions
        return Data(self.store, rows, selection, self.reads, read_text=self.read_text, cache=self._limit, wanted=wanted)

    def apart(self) -> Data:
        """The same rows for another thread, which keeps none of them."""
        other = copy(self)
        other._limit, other._cached, other._held = 0, OrderedDict(), 0
        return other

    def block(self, number: int) -> Rows:
        """A block's kept rows, decoded; from the cache where it is there."""
        if number in self._cached:
            self._cached.move_to_end(number)
            return self._cached[number]
        rows = self._load(self.places[number])
        self._cached[number] = rows
        self._held += rows.bytes
        while self._held > self._limit and len(self._cached) > 1:
            self._held -= self._cached.popitem(last=False)[1].bytes
        return rows

    def batch(self, rows: Sequence[tuple[int, int]], seed: int) -> Batch:
        """Those (block, kept row) pairs, in that order."""
        places: dict[int, list[int]] = {}
        for place, (block, _) in enumerate(rows):
            places.setdefault(block, []).append(place)
        uids, captions = [b""] * len(rows), [""] * len(rows)
        tensors: dict[str, Tensor] = {}
        for block in sorted(places):
            loaded, at = self.block(block), places[block]
            taken = [rows[place][1] for place in at]
            for place, row in zip(at, taken, strict=True):
                uids[place], captions[place] = loaded.uids[row], loaded.captions[row]
            for name, tensor in loaded.tensors.items():
                if name not in tensors:
                    tensors[name] = tensor.new_empty((len(rows), *tensor.shape[1:]))
                tensors[name][at] = tensor[taken]
        return Batch(seed, uids, captions, tensors)

    def _load(self, place: Place) -> Rows:
        columns = ["uid", "caption"]
        if self.reads.embeddings:
            columns.append("image_embedding")
        if self.reads.text_embeddings:
            columns.append("text_embedding")
        if self.reads.image and not self.reads.originals:
            columns.append("image")
        table = read_rows(self.store, place.parquet, place.first, place.rows, columns).take(pa.array(place.keep))
        uids, captions = table["uid"].to_pylist(), table["caption"].to_pylist()
        tensors: dict[str, Tensor] = {}
        if self.reads.image:
            pictures = self._originals(place, uids) if self.reads.originals else table["image"].to_pylist()
            decoded = [self.reads.image(data, uid) for data, uid in zip(pictures, uids, strict=True)]
            tensors["image"] = torch.from_numpy(np.stack(decoded))
        if self.reads.embeddings:
            tensors["image_embedding"] = torch.from_numpy(matrix(table["image_embedding"]))
        if self.reads.text_embeddings:
            tensors["text_embedding"] = torch.from_numpy(matrix(table["text_embedding"]))
        if self.reads.labels is not None:
            tensors["labels"] = self._labels(place.index)(uids)
        if self.reads.text and self.read_text is not None:
            # Equal captions are read once; the rest of a block's row then depends on the block alone.
            distinct = list(dict.fromkeys(captions))
            where = {caption: number for number, caption in enumerate(distinct)}
            chosen = torch.tensor([where[caption] for caption in captions])
            tensors |= {name: tensor[chosen] for name, tensor in self.read_text(distinct).items()}
        return Rows(uids, captions, tensors)

    def _originals(self, place: Place, uids: Sequence[bytes]) -> list[bytes]:
        """The encoded pictures of those rows: one range of the tar, cut by the index's offsets."""
        index = self._index(place.index)
        missing = [uid for uid in uids if uid not in index]
        if missing:
            raise Refused(f"row {missing[0].hex()} has no picture in the index {place.index[:12]}", code=5)
        spans = [index[uid] for uid in uids]
        first = min(offset for offset, _ in spans)
        last = max(offset + length for offset, length in spans)
        data = self.store.get(object_name(place.tar), first, last - first)
        return [data[offset - first : offset - first + length] for offset, length in spans]

    def _read_index(self, sha: str) -> dict[bytes, tuple[int, int]]:
        columns = pq.read_table(self.store.local(object_name(sha)), columns=["uid", "offset", "length"]).to_pydict()
        rows = zip(columns["uid"], columns["offset"], columns["length"], strict=True)
        return {uid: (offset, length) for uid, offset, length in rows if offset is not None}


def _places(
    store: Store, record: Record, selections: dict[str, str], labels: Labels | None, wanted: Wanted | None
) -> Iterator[Place]:
    """The blocks of a shard, with the rows that its selection keeps and that are wanted and, where labels are asked
    for, that have one."""
    name = "rows.parquet" if "rows.parquet" in record.files else "index.parquet"
    sha = record.sha(name)
    if f"{sha}.parquet" not in selections:
        raise Refused(
            f"the selection says nothing of the shard {sha[:12]}: it is of another version of the data", code=5
        )
    selection = pq.read_table(store.local(object_name(selections[f"{sha}.parquet"])), columns=["uid", "rule"])
    kept = selection["uid"].combine_chunks().filter(pc.is_null(selection["rule"].combine_chunks()))
    uids = pq.read_table(store.local(object_name(sha)), columns=["uid"])["uid"].combine_chunks()
    mask = pc.is_in(uids, value_set=kept).to_numpy(zero_copy_only=False)
    if int(mask.sum()) != len(kept):
        raise Refused(
            f"the selection of the shard {sha[:12]} names {len(kept)} rows, of which it has {int(mask.sum())}", code=5
        )
    tar = record.facts.get("tar") or (record.sha("images.tar") if "images.tar" in record.files else "")
    index = record.facts.get("index") or sha
    if labels is not None:
        having = labelled(store, index, labels.columns)
        mask &= pc.is_in(uids, value_set=having).to_numpy(zero_copy_only=False)
    if wanted is not None:
        mask &= wanted(uids)
    for block in record.blocks:
        keep = np.flatnonzero(mask[block.first : block.first + block.rows])
        yield Place(sha, block.first, block.rows, keep, tar, index)


def read_rows(store: Store, sha: str, first: int, rows: int, columns: Sequence[str]) -> pa.Table:
    """Rows [first, first + rows) of a Parquet object, reading only the row groups that hold them."""
    with pq.ParquetFile(store.local(object_name(sha))) as file:
        groups, start, begins = [], 0, None
        for number in range(file.num_row_groups):
            count = file.metadata.row_group(number).num_rows
            if start < first + rows and start + count > first:
                groups.append(number)
                begins = start if begins is None else begins
            start += count
        return file.read_row_groups(groups, columns=list(columns), use_threads=False).slice(first - (begins or 0), rows)


def decode(data: bytes) -> np.ndarray:
    """An encoded picture as uint8 [3, h, w]."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as opened:
        return np.ascontiguousarray(np.asarray(opened.convert("RGB")).transpose(2, 0, 1))


def picture(data: bytes, uid: bytes, *, size: int) -> np.ndarray:
    """An encoded picture as uint8 [3, size, size]: its central square, averaged down (box filter) where it is larger.

    Refused for a picture that is smaller.
    """
    from PIL import Image

    pixels = decode(data)
    height, width = pixels.shape[1:]
    side = min(height, width)
    if side < size:
        raise Refused(
            f"picture {uid.hex()} is {width}×{height} px, and this model trains on {size} px. "
            "Download at that size or larger (download.size), or leave this upsampler out."
        )
    if (height, width) == (size, size):
        return pixels
    left, top = (width - side) // 2, (height - side) // 2
    square = Image.fromarray(pixels.transpose(1, 2, 0)).resize(
        (size, size), Image.Resampling.BOX, (left, top, left + side, top + side)
    )
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of fixed-size float lists as float32 [rows, width]."""
    array = column.combine_chunks()
    return array.flatten().to_numpy().reshape(len(array), -1).astype(np.float32)
