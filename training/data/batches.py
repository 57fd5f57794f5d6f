"""Blocks → batches: reads the rows that are wanted, and decodes them.

A block is read whole, and CLIP reads its captions whole, whichever of its rows are wanted first: so the values of a row
depend on nothing but its block, neither on the cache nor on the number of workers. Everything is joined by uid, never
by position.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from infra.errors import Refused
from infra.records import RowGroups
from infra.store import Store
from training.data.blocks import BlockRef, Index, Spans, Wanted, as_matrix, block_refs
from training.data.labels import Labels, Reader

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
    """The kept rows of one block: uids and captions [k], tensors [k, ...]."""

    uids: list[bytes]
    captions: list[str]
    tensors: dict[str, Tensor]
    pictures: Sequence[bytes] | Spans = ()
    """Their encoded pictures, where these are decoded only when their turn comes."""

    @property
    def bytes(self) -> int:
        """Memory that it holds, roughly."""
        encoded = 0 if isinstance(self.pictures, Spans) else sum(map(len, self.pictures))
        return sum(tensor.nbytes for tensor in self.tensors.values()) + encoded + 200 * len(self.uids)


class Data:
    """The rows that a job trains on.

    rows and selection are versions of embed's and curate's manifests, or of download's and filter's. cache is the
    memory in bytes for blocks that were read. Where all pictures have room in it decoded, a block is decoded whole and
    stays; else each picture is decoded when its turn comes, by so many threads (`decoders`), and goes with its batch.
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
        decoders: int = 1,
        wanted: Wanted | None = None,
    ) -> None:
        self.store, self.reads, self.read_text = store, reads, read_text
        self._versions = rows, selection
        self.places = block_refs(store, rows, selection, reads.labels, wanted)
        self.limit, self._decoders = cache, decoders
        self._cached: OrderedDict[int, Rows] = OrderedDict()
        self._held = 0
        self._whole: bool | None = None
        """Whether all decoded pictures have room; None until the first is decoded."""
        self._map: Callable[..., Iterable[np.ndarray]] = map
        if decoders > 1:
            self._map = ThreadPoolExecutor(decoders, thread_name_prefix="decode").map
        self._file = lru_cache(maxsize=64)(lambda file: RowGroups(store, file))
        self._index = lru_cache(maxsize=32)(lambda index: Index(store, index))
        self._labels = lru_cache(maxsize=8)(lambda index: Reader(store, index, reads.labels or Labels(())))

    @property
    def counts(self) -> tuple[int, ...]:
        """Kept rows of each block, for `Order`."""
        return tuple(len(place.keep) for place in self.places)

    @property
    def row_bytes(self) -> float:
        """Memory a row, on average over the blocks that are in the cache; 0 of none."""
        return self._held / max(1, sum(len(rows.uids) for rows in self._cached.values()))

    def where(self, wanted: Wanted) -> Data:
        """The same data without the rows that are not wanted."""
        return Data(
            self.store,
            *self._versions,
            self.reads,
            read_text=self.read_text,
            cache=self.limit,
            decoders=self._decoders,
            wanted=wanted,
        )

    def apart(self) -> Data:
        """The same rows for another thread: it keeps none of them, and decodes none but those of its batches."""
        other = copy(self)
        other.limit, other._cached, other._held, other._whole, other._map = 0, OrderedDict(), 0, False, map
        return other

    def block(self, number: int) -> Rows:
        """A block's kept rows; from the cache where it is there."""
        if number in self._cached:
            self._cached.move_to_end(number)
            return self._cached[number]
        rows = self._load(self.places[number])
        self._cached[number] = rows
        self._held += rows.bytes
        while self._held > self.limit and len(self._cached) > 1:
            self._held -= self._cached.popitem(last=False)[1].bytes
        return rows

    def batch(self, rows: Sequence[tuple[int, int]], seed: int) -> Batch:
        """Those (block, kept row) pairs, in that order."""
        at_block: dict[int, list[int]] = {}
        for place, (block, _) in enumerate(rows):
            at_block.setdefault(block, []).append(place)
        uids, captions = [b""] * len(rows), [""] * len(rows)
        tensors: dict[str, Tensor] = {}
        undecoded: dict[int, tuple[Rows, int]] = {}
        for block in sorted(at_block):
            loaded, at = self.block(block), at_block[block]
            taken = [rows[place][1] for place in at]
            for place, row in zip(at, taken, strict=True):
                uids[place], captions[place] = loaded.uids[row], loaded.captions[row]
            for name, tensor in loaded.tensors.items():
                if name not in tensors:
                    tensors[name] = tensor.new_empty((len(rows), *tensor.shape[1:]))
                tensors[name][at] = tensor[taken]
            if loaded.pictures:
                undecoded |= {place: (loaded, row) for place, row in zip(at, taken, strict=True)}
        if undecoded:
            tensors["image"] = self._decoded([undecoded[place] for place in range(len(rows))])
        return Batch(seed, uids, captions, tensors)

    def fetch(self, number: int) -> None:
        """Brings a block's bytes to this machine, from a store that is elsewhere; any thread may."""
        if self.store.distant and len(self.places[number].keep):
            place = self.places[number]
            table = self._read(place)
            if self.reads.originals:
                self._spans(place, table["uid"].to_pylist()).fetch()

    def _read(self, place: BlockRef) -> pa.Table:
        """What is wanted of a block's kept rows, out of its Parquet file."""
        columns = ["uid", "caption"]
        if self.reads.embeddings:
            columns.append("image_embedding")
        if self.reads.text_embeddings:
            columns.append("text_embedding")
        if self.reads.image and not self.reads.originals:
            columns.append("image")
        table = self._file(place.parquet).read(place.first, place.rows, columns)
        place.check(table["uid"])
        return table if len(place.keep) == place.rows else table.take(pa.array(place.keep))

    def _spans(self, place: BlockRef, uids: Sequence[bytes]) -> Spans:
        return Spans(self.store, place.tar, self._index(place.index).spans(uids))

    def _load(self, place: BlockRef) -> Rows:
        reads, table = self.reads, self._read(place)
        uids, captions = table["uid"].to_pylist(), table["caption"].to_pylist()
        tensors: dict[str, Tensor] = {}
        if reads.embeddings:
            tensors["image_embedding"] = torch.from_numpy(as_matrix(table["image_embedding"]))
        if reads.text_embeddings:
            tensors["text_embedding"] = torch.from_numpy(as_matrix(table["text_embedding"]))
        if reads.labels is not None:
            tensors["labels"] = self._labels(place.index)(uids)
        if reads.text and self.read_text is not None:
            # Equal captions are read once; the rest of a block's row then depends on the block alone.
            distinct = list(dict.fromkeys(captions))
            where = {caption: number for number, caption in enumerate(distinct)}
            chosen = torch.tensor([where[caption] for caption in captions])
            tensors |= {name: tensor[chosen] for name, tensor in self.read_text(distinct).items()}
        loaded = Rows(uids, captions, tensors)
        if reads.image and uids:
            loaded.pictures = self._spans(place, uids) if reads.originals else table["image"].to_pylist()
            if self._whole is None:
                row = self._decoded([(loaded, 0)]).nbytes + loaded.bytes / len(uids)
                self._whole = row * sum(self.counts) <= self.limit
            if self._whole:
                tensors["image"] = self._decoded([(loaded, row) for row in range(len(uids))])
                loaded.pictures = ()
        return loaded

    def _decoded(self, rows: Sequence[tuple[Rows, int]]) -> Tensor:
        """Those rows' pictures, uint8 [rows, 3, s, s]."""
        assert self.reads.image is not None
        decode = self.reads.image
        stacked: np.ndarray | None = None
        for place, pixels in enumerate(self._map(lambda at: decode(at[0].pictures[at[1]], at[0].uids[at[1]]), rows)):
            if stacked is None:
                stacked = np.empty((len(rows), *pixels.shape), pixels.dtype)
            stacked[place] = pixels
        return torch.from_numpy(stacked)


def decode_image(data: bytes) -> np.ndarray:
    """An encoded picture as uint8 [3, h, w]."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as opened:
        return np.ascontiguousarray(np.asarray(opened.convert("RGB")).transpose(2, 0, 1))


def picture(data: bytes, uid: bytes, *, size: int) -> np.ndarray:
    """An encoded picture as uint8 [3, size, size]: its central square, averaged down (box filter) where it is larger.

    Refused for a picture that is smaller.
    """
    from PIL import Image

    pixels = decode_image(data)
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
