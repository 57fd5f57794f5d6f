"""Pictures and captions → rows that hold all a trainer needs: raw CLIP embeddings, score, and the base picture.

Reads a shard's tar through filter's selection. Batches always have the same shape, filled up at the end, so that a
row's embedding does not depend on how many neighbours it has.
"""

from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import Refused
from infra.manifest import Action, Block, Manifest, Record, object_name
from infra.rows import KEPT, embedded
from infra.store import Store
from pipelines.pictures import picture
from pipelines.select import selected
from pipelines.stage import PoolHow, plain
from unclip.config import SIDE, outside

if TYPE_CHECKING:
    from PIL.Image import Image

    from unclip.clip import Clip

TABLE = "rows.parquet"
BLOCK_ROWS = 256

_loaded: dict[tuple[str, str], Clip] = {}


@dataclass(frozen=True)
class EmbedSpec:
    """What is stored of each pair beside its embeddings."""

    base: int = 64
    """Side of the stored picture in pixels, which the decoder learns to draw."""
    batch: int = 64
    """Pairs that CLIP sees at a time. It is in the key, since sums in CLIP may depend on it."""

    def __post_init__(self) -> None:
        if wrong := outside(self, base=SIDE):
            raise Refused(f"embed.{wrong}")
        if not 1 <= self.batch <= BLOCK_ROWS:
            raise Refused(
                f"embed.batch is {self.batch}; it must lie between 1 and {BLOCK_ROWS}, the rows of a row group"
            )


@dataclass(frozen=True)
class Embed:
    """Stage: each downloaded shard → `rows.parquet`; a block is a row group of at most 256 rows."""

    spec: EmbedSpec = field(default_factory=EmbedSpec)
    how: PoolHow = field(default_factory=PoolHow)
    name: str = "embed"
    group: str = "embed"
    version: int = 1
    needs: tuple[str, ...] = ("download", "filter", "clip")
    kind: str = "actor"

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        download, selection, clip = inputs
        spec = plain(self.spec)
        for record in download.records:
            tar, index = record.sha("images.tar"), record.sha("index.parquet")
            chosen = selection.only.sha(f"{index}.parquet")
            yield Action(f"{self.name}/{self.version}", spec, (tar, index, chosen, clip.version))

    def setup(self) -> None:
        """Sets the number of threads; CLIP is loaded by the first `run`, which knows which one, and then stays."""
        import torch

        torch.set_num_threads(self.how.threads)

    def run(self, action: Action, store: Store, out: Path) -> Record:
        tar, index, selection, version = action.inputs
        clip = load_clip(store, version, "cuda" if self.how.gpus else "cpu")
        rows = chosen_rows(store, index, selection)
        schema = embedded(clip.embedding_width)
        states: Counter[str] = Counter()
        blocks: list[Block] = []
        first = 0
        packed = {"caption": "zstd", "url": "zstd"}  # nothing else gets smaller
        with (
            open(store.local(object_name(tar)), "rb") as pictures,
            pq.ParquetWriter(out / TABLE, schema, compression=packed, use_dictionary=False) as writer,
        ):
            for start in range(0, rows.num_rows, BLOCK_ROWS):
                group = rows.slice(start, BLOCK_ROWS)
                parts = [
                    self._batch(clip, group.slice(at, self.spec.batch).to_pylist(), pictures, states, schema)
                    for at in range(0, group.num_rows, self.spec.batch)
                ]
                table = pa.concat_tables(parts).combine_chunks()
                if table.num_rows:
                    writer.write_table(table, row_group_size=BLOCK_ROWS)
                    blocks.append(Block(TABLE, first, table.num_rows))
                    first += table.num_rows
        facts = {"tar": tar, "index": index, "selection": selection, "clip": clip.fingerprint, "base": self.spec.base}
        return Record.of(action, out, states=states, blocks=blocks, facts=facts)

    def _batch(
        self, clip: Clip, rows: list[dict[str, Any]], pictures: BinaryIO, states: Counter[str], schema: pa.Schema
    ) -> pa.Table:
        """The rows of one batch that can be embedded, as a table; counts every row's state."""
        import torch
        import torch.nn.functional as F

        kept, seen, stored = [], [], []
        for row in rows:
            image = picture(pictures, row["offset"], row["length"])
            if image is None:
                states["undecodable"] += 1
            elif min(image.size) < self.spec.base:
                states["below_base"] += 1
            else:
                states[KEPT] += 1
                kept.append(row)
                seen.append(clip.preprocess(pixels(image)))
                stored.append(base(image, self.spec.base))
        if not kept:
            return schema.empty_table()
        spare = self.spec.batch - len(kept)
        size = clip.image_size
        images = torch.cat([*seen, torch.zeros(spare, 3, size, size)]).to(clip.device)
        captions = [row["caption"] for row in kept]
        with torch.no_grad():
            image_embedding = clip.model.encode_image(images)[: len(kept)].float().cpu()  # type: ignore[operator]
            text_embedding = clip.encode_text([*captions, *[""] * spare]).embedding[: len(kept)].float().cpu()
            score = F.cosine_similarity(image_embedding, text_embedding)
        columns = {
            "uid": [row["uid"] for row in kept],
            "caption": captions,
            "image_embedding": _vectors(image_embedding.numpy(), schema),
            "text_embedding": _vectors(text_embedding.numpy(), schema),
            "score": pa.array(score.numpy()),
            "image": stored,
            "url": [row["url"] for row in kept],
        }
        return pa.table(columns, schema=schema)


def chosen_rows(store: Store, index: str, selection: str) -> pa.Table:
    """Rows of an index object (uid, url, caption, offset, length) that a selection object lets stay, in order."""
    wanted = ["uid", "url", "caption", "state", "offset", "length"]
    table = pq.read_table(store.local(object_name(index)), columns=wanted)
    table = table.filter(pc.equal(table["state"], KEPT))
    uids = selected(store, selection)
    table = table.filter(pc.is_in(table["uid"], value_set=uids))
    if table.num_rows != len(uids):
        raise Refused(
            f"the selection {selection[:12]} names {len(uids)} rows, of which the index {index[:12]} has "
            f"{table.num_rows}: it is of another version of the data. Run again from the filter on: unclip run RECIPE",
            code=5,
        )
    return table


def pixels(image: Image) -> Any:
    """A picture as a tensor, uint8 [1, 3, h, w]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def base(image: Image, side: int) -> bytes:
    """The central square of a picture, averaged down to side × side pixels (box filter), as PNG."""
    from PIL.Image import Resampling

    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    if image.size != (side, side):
        image = image.resize((side, side), Resampling.BOX, (left, top, left + short, top + short))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def load_clip(store: Store, version: str, device: str) -> Clip:
    """The CLIP of a manifest version, loaded once a process."""
    from unclip.clip import Clip

    if (version, device) in _loaded:
        return _loaded[version, device]
    record = Manifest.load(store, version, "clip").only
    with tempfile.TemporaryDirectory(prefix="unclip-clip-") as folder:
        for name, file in record.files.items():
            place = Path(folder, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(store.local(object_name(file.sha256)).absolute())
        clip = Clip.load(folder).to(device)
    _loaded.clear()  # one at a time: it may be large
    _loaded[version, device] = clip
    return clip


def _vectors(values: Any, schema: pa.Schema) -> pa.FixedSizeListArray:
    """float32 [rows, width] as a column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=schema.field("image_embedding").type)
