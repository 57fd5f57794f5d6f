"""Pictures and captions → rows that hold all a trainer needs: raw CLIP embeddings, score, and the base picture.

Reads a shard's tar through filter's selection, in one pass. Threads read, decode and shrink pictures while CLIP is at
work (prefetch.py). Calls of CLIP always have the same shapes, filled up at the end, so that a row's embedding does not
depend on how many neighbours it has, nor on how many threads there are.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import Refused
from infra.records import KEPT, Action, Block, Manifest, Record, embedded_schema, materialised, object_name
from infra.store import Store
from pipelines.download import decode_picture
from pipelines.embed.prefetch import DeviceCopier, prefetched
from pipelines.embed.text import Captions
from pipelines.progress import count_rows, expect_rows
from pipelines.select import read_selection
from pipelines.stage import PoolHow, StageBase, plain
from unclip.config import COUNT, LATER, SIDE, Range, outside

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from unclip.clip import Clip

TABLE = "rows.parquet"
BLOCK_ROWS = 256
PRECISIONS = ("float32", "bfloat16", "float16")
LENGTHS = Range(2, 4096)
"""Tokens: a text has a start and an end."""
_CHUNK = 16
"""Rows that a thread takes at a time."""

_loaded: dict[tuple[str, str, str], Clip] = {}


@dataclass(frozen=True)
class EmbedSpec:
    """What is stored of each pair beside its embeddings, and how exactly CLIP computes these."""

    base: int = 64
    """Side of the stored picture in pixels, which the decoder learns to draw."""
    batch: int = 64
    """Pairs that CLIP sees at a time. It is in the key, since sums in CLIP may depend on it."""
    precision: str = field(default="float32", metadata=LATER)
    """What CLIP computes in: float32; or bfloat16 or float16, where the device has units for it. Stored is float32."""
    lengths: tuple[int, ...] = field(default=(), metadata=LATER)
    """Tokens that captions are filled up to, as [16, 32]: each to the least that holds it, else to CLIP's context.
    CLIP reads short captions faster so, and sees the same; without, all are filled up to the context."""

    def __post_init__(self) -> None:
        if wrong := outside(self, base=SIDE, lengths=LENGTHS):
            raise Refused(f"embed.{wrong}")
        if not 1 <= self.batch <= BLOCK_ROWS:
            raise Refused(
                f"embed.batch is {self.batch}; it must lie between 1 and {BLOCK_ROWS}, the rows of a row group"
            )
        if self.precision not in PRECISIONS:
            raise Refused(f"embed.precision is {self.precision!r}; use one of {', '.join(PRECISIONS)}")
        if list(self.lengths) != sorted({*self.lengths}):
            raise Refused(f"embed.lengths is {list(self.lengths)}; they must grow")


@dataclass(frozen=True)
class EmbedHow(PoolHow):
    """Who embeds."""

    decoders: int = 1
    """Threads of each process that read, decode and shrink pictures while CLIP is at work."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := outside(self, decoders=COUNT):
            raise Refused(f"embed.{wrong}")


@dataclass(frozen=True)
class PreparedPicture:
    """A row's picture as CLIP sees it, [1, 3, size, size], and as it is stored; or the state that says why not."""

    state: str
    pixels: Tensor | None = None
    stored: bytes = b""


@dataclass(frozen=True)
class Batch:
    """Rows that CLIP sees at a time."""

    rows: list[int]
    """Places of the kept rows among the selected."""
    stored: list[bytes]
    """Their base pictures."""


@dataclass(frozen=True)
class Embed(StageBase):
    """Stage: each downloaded shard → `rows.parquet`; a block is a row group of at most 256 rows."""

    spec: EmbedSpec = field(default_factory=EmbedSpec)
    how: EmbedHow = field(default_factory=EmbedHow)
    name = group = "embed"
    needs = ("download", "filter", "clip")
    kind = "actor"
    maps = "download"
    role = "rows"
    step = "embedded"

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        download, selection, clip = inputs
        spec = plain(self.spec)
        for record in download.records:
            tar, index = record.sha("images.tar"), record.sha("index.parquet")
            chosen = selection.only.sha(f"{index}.parquet")
            yield self.action(spec, (tar, index, chosen, clip.version))

    def setup(self) -> None:
        """Sets the number of threads; CLIP is loaded by the first `run`, which knows which one, and then stays."""
        import torch

        torch.set_num_threads(self.how.threads)

    def run(self, action: Action, store: Store, out: Path) -> Record:
        tar, index, selection, version = action.inputs
        clip = load_clip(store, version, "cuda" if self.how.gpus else "cpu", self.spec.precision)
        rows = chosen_rows(store, index, selection).combine_chunks()  # else each `take` would join the chunks anew
        schema = embedded_schema(clip.embedding_width)
        states: Counter[str] = Counter()
        blocks: list[Block] = []
        expect_rows(rows.num_rows)
        packed = {"caption": "zstd", "url": "zstd"}  # nothing else gets smaller
        spans = list(_spans(rows.num_rows, self.spec.batch))
        chunks = [span[at : at + _CHUNK] for span in spans for at in range(0, len(span), _CHUNK)]
        most = self.how.decoders + 2 * -(-self.spec.batch // _CHUNK)  # two batches ahead of the one at work
        first = 0
        with (
            open(store.local(object_name(tar)), "rb") as pictures,
            prefetched(partial(self._look, clip, pictures.fileno(), rows), chunks, self.how.decoders, most) as looked,
            pq.ParquetWriter(out / TABLE, schema, compression=packed, use_dictionary=False) as writer,
        ):
            parts = self._embedded(clip, rows, self._batches(spans, looked, states), schema)
            for _, group in groupby(parts, key=lambda part: part[0].rows[0] // BLOCK_ROWS):
                table = pa.concat_tables(table for _, table in group).combine_chunks()
                writer.write_table(table, row_group_size=BLOCK_ROWS)
                blocks.append(Block(TABLE, first, table.num_rows))
                first += table.num_rows
                count_rows(states)
            count_rows(states)
        facts = {"tar": tar, "index": index, "selection": selection, "clip": clip.fingerprint, "base": self.spec.base}
        return Record.of(action, out, states=states, blocks=blocks, facts=facts)

    def _look(self, clip: Clip, tar: int, rows: pa.Table, chunk: range) -> list[PreparedPicture]:
        """Reads some rows' pictures out of an open tar, and makes of them what CLIP sees and what is stored."""
        found = []
        part = rows.slice(chunk.start, len(chunk))
        for offset, length in zip(part["offset"].to_pylist(), part["length"].to_pylist(), strict=True):
            image = decode_picture(os.pread(tar, length, offset))
            if image is None:
                found.append(PreparedPicture("undecodable"))
            elif min(image.size) < self.spec.base:
                found.append(PreparedPicture("below_base"))
            else:
                seen = clip.preprocess(picture_tensor(image)).to(clip.dtype)
                found.append(PreparedPicture(KEPT, seen, base_picture(image, self.spec.base)))
        return found

    def _batches(
        self, spans: Sequence[range], looked: Iterator[list[PreparedPicture]], states: Counter[str]
    ) -> Iterator[tuple[Batch, list[Tensor]]]:
        """The rows of each span that can be embedded, if any can, and their pixels; counts every row's state."""
        for span in spans:
            found = [one for _ in range(0, len(span), _CHUNK) for one in next(looked)]
            states.update(one.state for one in found)
            kept = [
                (row, one.stored, one.pixels) for row, one in zip(span, found, strict=True) if one.pixels is not None
            ]
            if kept:
                rows, stored, seen = (list(column) for column in zip(*kept, strict=True))
                yield Batch(rows, stored), seen

    def _embedded(
        self, clip: Clip, rows: pa.Table, batches: Iterator[tuple[Batch, list[Tensor]]], schema: pa.Schema
    ) -> Iterator[tuple[Batch, pa.Table]]:
        """Each batch and its rows' table, one behind: a GPU has the next batch to do while this one is waited for."""
        import torch

        lane = DeviceCopier(clip.device)
        captions = Captions(clip, lane, rows["caption"].to_pylist(), self.spec.lengths, self.spec.batch)
        size = clip.image_size
        before: tuple[Batch, Callable[[], Tensor]] | None = None
        for batch, seen in batches:
            captions.ask(batch.rows)
            spare = torch.zeros(self.spec.batch - len(seen), 3, size, size, dtype=clip.dtype)
            embeddings = clip.encode_pixels(lane.send([*seen, spare]))[: len(seen)]
            due, before = before, (batch, lane.fetch(embeddings))
            if due:
                yield due[0], self._table(rows, *due, captions, schema)
        if before:
            yield before[0], self._table(rows, *before, captions, schema)

    def _table(
        self, rows: pa.Table, batch: Batch, images: Callable[[], Tensor], captions: Captions, schema: pa.Schema
    ) -> pa.Table:
        """A batch's rows as they are stored."""
        import torch
        import torch.nn.functional as F

        image, text = images(), captions.take(batch.rows)
        if not (torch.isfinite(image).all() and torch.isfinite(text).all()):
            raise Refused(
                f"CLIP's embeddings of some of the rows {batch.rows[0]} to {batch.rows[-1]} of a shard are not finite "
                f"in {self.spec.precision}. Set embed.precision to bfloat16 or float32, or take another CLIP.",
                code=5,
            )
        kept = _of(rows.select(["uid", "caption", "url"]), batch.rows)
        columns = {
            "uid": kept["uid"],
            "caption": kept["caption"],
            "image_embedding": _vectors(image.numpy(), schema),
            "text_embedding": _vectors(text.numpy(), schema),
            "score": pa.array(F.cosine_similarity(image, text).numpy()),
            "image": batch.stored,
            "url": kept["url"],
        }
        return pa.table(columns, schema=schema)


def _of(table: pa.Table, rows: Sequence[int]) -> pa.Table:
    """Some rows of a table, in growing order; nearly always neighbours, of which nothing is copied."""
    together = rows[-1] - rows[0] + 1 == len(rows)
    return table.slice(rows[0], len(rows)) if together else table.take(list(rows))


def _spans(rows: int, batch: int) -> Iterator[range]:
    """The rows that CLIP sees at a time: no batch crosses the end of a block."""
    for start in range(0, rows, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, rows)
        yield from (range(at, min(at + batch, stop)) for at in range(start, stop, batch))


def chosen_rows(store: Store, index: str, selection: str) -> pa.Table:
    """Rows of an index object (uid, url, caption, offset, length) that a selection object lets stay, in order."""
    wanted = ["uid", "url", "caption", "state", "offset", "length"]
    table = pq.read_table(store.local(object_name(index)), columns=wanted)
    table = table.filter(pc.equal(table["state"], KEPT))
    uids = read_selection(store, selection)
    table = table.filter(pc.is_in(table["uid"], value_set=uids))
    if table.num_rows != len(uids):
        raise Refused(
            f"the selection {selection[:12]} names {len(uids)} rows, of which the index {index[:12]} has "
            f"{table.num_rows}: it is of another version of the data. Run again from the filter on: unclip run RECIPE",
            code=5,
        )
    return table


def picture_tensor(image: Image) -> Any:
    """A picture as a tensor, uint8 [1, 3, h, w]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def base_picture(image: Image, side: int) -> bytes:
    """The central square of a picture, averaged down to side × side pixels (box filter), as PNG."""
    from PIL.Image import Resampling

    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    if image.size != (side, side):
        image = image.resize((side, side), Resampling.BOX, (left, top, left + short, top + short))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def load_clip(store: Store, version: str, device: str, precision: str = "float32") -> Clip:
    """The CLIP of a manifest version, loaded once a process."""
    from unclip.clip import Clip

    wanted = version, device, precision
    if wanted in _loaded:
        return _loaded[wanted]
    with materialised(store, version, "clip") as folder:
        clip = Clip.load(folder).to(device, precision)
    _loaded.clear()  # one at a time: it may be large
    _loaded[wanted] = clip
    return clip


def _vectors(values: Any, schema: pa.Schema) -> pa.FixedSizeListArray:
    """float32 [rows, width] as a column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=schema.field("image_embedding").type)
