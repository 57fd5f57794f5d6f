"""What `million.py` gives the commands that it measures: lists, a recipe, and the records of `download` and of `embed`.

Rows, pictures and vectors are drawn by their number, and go through the project's own code into the store, in two
processes.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

SHARD = 1000
CHANGED = 0.01
"""Share of rows that the second list has others of, for `data diff`."""
RULES = {
    "filter": [
        {"rule": "size", "min_side": 8},
        {"rule": "caption", "min_words": 2},
        {"rule": "blocked_terms", "terms": ["blocked", "not this"]},
        {"rule": "exact_duplicates"},
        {"rule": "near_duplicates"},
    ],
    "curate": [{"rule": "caption", "min_words": 3}, {"rule": "clip_score", "top_fraction": 0.5}],
}
DATA = ("source", "download", "filter-look", "filter", "clip", "embed", "curate-look", "curate")


def write_recipe(folder: Path) -> Path:
    """The tiny recipe over our list, with every rule that decides over all rows."""
    import yaml

    from pipelines.recipe import schema as recipes

    said = yaml.safe_load((recipes.FOLDER / "tiny.yaml").read_text())
    del said["world"], said["download"]["resolve"], said["evaluate"]
    said["download"]["format"] = "jpg"
    said["source"] = {"urls": str(folder / "list.parquet"), "rows_per_shard": SHARD}
    said["evaluate"] = {"prompts": "prompts.jsonl"}
    for group, rules in RULES.items():
        said[group] = {"rules": rules}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


def write_list(path: Path, rows: int, changed: float = 0.0) -> None:
    """A list of that many pairs; a few captions are short, blocked, or (changed) others than in the first list."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("url", pa.string()), ("caption", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 50_000):
            numbers = range(start, min(rows, start + 50_000))
            drawn = np.random.default_rng(start).random((2, len(numbers)))
            words = [f"a picture of the thing {number}" for number in numbers]
            words = ["one" if luck < 0.02 else word for word, luck in zip(words, drawn[0], strict=True)]
            words = ["a blocked word" if luck > 0.98 else word for word, luck in zip(words, drawn[0], strict=True)]
            words = [f"{word} anew" if luck < changed else word for word, luck in zip(words, drawn[1], strict=True)]
            urls = [f"https://pictures.test/{number % 977}/{number}.jpg" for number in numbers]
            writer.write_table(pa.table([urls, words], schema=schema))


def picture(number: int) -> bytes:
    """The picture of that number, a small JPEG: one in twenty equals an earlier one, twice as many nearly do."""
    from PIL import Image

    shown, near = seen(number)
    pixels = hashlib.blake2b(str(shown).encode()).digest()
    image = Image.frombytes("L", (8, 8), pixels).resize((16, 16), Image.Resampling.NEAREST)
    if near:
        image.putpixel((number % 16, 3), 128)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95)
    return out.getvalue()


def seen(number: int) -> tuple[int, bool]:
    """(what the picture of that number shows, whether with a small change): itself, or what an earlier one shows."""
    drawn = hashlib.blake2b(f"luck {number}".encode(), digest_size=16).digest()
    luck, earlier = drawn[0] / 256, int.from_bytes(drawn[1:8], "big") % (number + 1)
    return (earlier if luck < 0.15 else number), 0.05 <= luck < 0.15


def job(folder: Path) -> Any:
    """The recipe joined with its store."""
    from pipelines.run import prepared

    return prepared(str(folder / "recipe.yaml"), str(folder / "store"), (), create=True)


def resolved(folder: Path, wanted: str) -> tuple[Any, Any, Any]:
    """(store, stage, what there is of it) of a stage whose inputs are all there."""
    from pipelines.engine.graph import order, resolve

    with job(folder) as found:
        known: dict[str, Any] = {}
        for stage in order(found.stages):
            if all(need in known for need in stage.needs):
                there = resolve(stage, [known[need] for need in stage.needs], found.store)
                if stage.name == wanted:
                    return found.store, stage, there
                if not there.todo:
                    known[stage.name] = there.manifest()
    raise SystemExit(f"{wanted} is not to be resolved in {folder}")


def make(folder: Path, wanted: str) -> None:
    """Makes a stage's records in two processes, and its manifest."""
    store, stage, there = resolved(folder, wanted)
    work: Any = {
        "download": indexed if (folder / "no-pictures").exists() else packed,
        "filter-look": partial(looked, stage=stage),
        "clip": clip,
        "embed": embedded,
        "curate-look": partial(ran, stage=stage),
    }[wanted]
    with ProcessPoolExecutor(2) as pool:
        size = 20
        todo = [(store.uri, action) for action in there.todo]
        parts = [todo[at : at + size] for at in range(0, len(todo), size)]
        made = [record for part in pool.map(work, parts) for record in part]
    there.manifest(made).save(store)


def packed(todo: Sequence[tuple[str, Any]]) -> list[Any]:
    """Shards of download, written by pipelines/download/shard.py."""
    import pyarrow.parquet as pq

    from infra.records.commits import commit
    from infra.records.objects import object_name
    from infra.records.schemas import KEPT
    from infra.store.opening import open_store
    from pipelines.download.images import Picture
    from pipelines.download.shard import Outcome, pack

    records = []
    for uri, action in todo:
        store = open_store(uri)
        table = pq.read_table(store.local(object_name(action.inputs[0])))
        numbers = numbers_of(table)

        def take(positions: Sequence[int], numbers: list[int] = numbers) -> Iterator[tuple[int, Outcome]]:
            for position in positions:
                data = picture(numbers[position])
                shown = Picture(None, data, 16, 16, 16, 16)
                yield position, Outcome(KEPT, hashlib.sha256(data).digest(), shown)

        with store.scratch() as out:
            records.append(commit(store, action, pack(action, table, {}, take, store, out, "jpg"), out))
    return records


def embedded(todo: Sequence[tuple[str, Any]]) -> list[Any]:
    """Shards of embed: vectors and scores that are drawn."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from infra.records import schemas as rows
    from infra.records.commits import commit
    from infra.records.manifest import Record
    from infra.store.opening import open_store
    from pipelines.embed.stage import BLOCK_ROWS, TABLE, chosen_rows

    records = []
    for uri, action in todo:
        store = open_store(uri)
        chosen = chosen_rows(store, action.inputs[1], action.inputs[2])
        random, count = np.random.default_rng(int(action.key[:8], 16)), chosen.num_rows
        vectors = [pa.FixedSizeListArray.from_arrays(pa.array(random.normal(size=4 * count).astype(np.float32)), 4)] * 2
        scores = pa.array(random.random(count), pa.float32())
        columns = [chosen["uid"], chosen["caption"], *vectors, scores, pa.array([b"\0" * 64] * count), chosen["url"]]
        with store.scratch() as out:
            pq.write_table(pa.table(columns, schema=rows.embedded_schema(4)), out / TABLE, row_group_size=BLOCK_ROWS)
            made = Record.of(action, out, states={rows.KEPT: count})
            records.append(commit(store, action, made, out))
    return records


def clip(todo: Sequence[tuple[str, Any]]) -> list[Any]:
    """A record in the place of CLIP's: nothing here reads it."""
    from infra.records.commits import commit
    from infra.records.manifest import Record
    from infra.store.opening import open_store

    records = []
    for uri, action in todo:
        store = open_store(uri)
        with store.scratch() as out:
            (out / "nothing").write_bytes(b"")
            records.append(commit(store, action, Record.of(action, out), out))
    return records


def indexed(todo: Sequence[tuple[str, Any]]) -> list[Any]:
    """Shards of download without pictures: an index as pipelines/download/shard.py writes it, beside an empty tar."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from infra.records.commits import commit
    from infra.records.objects import object_name
    from infra.records.schemas import INDEX, KEPT
    from infra.store.opening import open_store
    from pipelines.download.shard import TAR, shard_record

    records = []
    for uri, action in todo:
        store = open_store(uri)
        table = pq.read_table(store.local(object_name(action.inputs[0])))
        drawn = [seen(number) for number in numbers_of(table)]
        digests = [hashlib.sha256(str(shown).encode()).digest() for shown, _ in drawn]
        states, place, side = ([one] * len(drawn) for one in (KEPT, 1, 16))
        columns = [table["uid"], table["url"], table["caption"], states, place, place, side, side, digests]
        with store.scratch() as out:
            (out / TAR).write_bytes(b"\0" * 1024)
            index = pa.table([pa.array(one) if isinstance(one, list) else one for one in columns], INDEX.names)
            records.append(commit(store, action, shard_record(action, index.cast(INDEX), out), out))
    return records


def looked(todo: Sequence[tuple[str, Any]], stage: Any) -> list[Any]:
    """Looks of filter, of hashes that are drawn, as pipelines/select/stage.py writes them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from infra.records.commits import commit
    from infra.records.manifest import Record
    from infra.records.objects import object_name
    from infra.store.opening import open_store
    from pipelines.select.rules.base import PHASH
    from pipelines.select.stage import FEATURES

    records = []
    for uri, action in todo:
        store = open_store(uri)
        rows = pq.read_table(store.local(object_name(action.inputs[0])))
        hashes = [int.from_bytes(hashlib.blake2b(str(shown).encode(), digest_size=8).digest(), "big") ^ (1 << 7) * near
                  for shown, near in (seen(number) for number in numbers_of(rows))]  # fmt: skip
        rows = rows.append_column(PHASH, pa.array(hashes, pa.uint64()))
        columns: dict[str, Any] = {"uid": rows["uid"]}
        for rule in stage.rules:
            look = rule.features(rows)
            columns |= {f"{rule.label}.{name}": look[name] for name in look.column_names}
        with store.scratch() as out:
            pq.write_table(pa.table(columns), out / FEATURES, compression="zstd")
            made = Record.of(action, out, states={"looked": rows.num_rows})
            records.append(commit(store, action, made, out))
    return records


def ran(todo: Sequence[tuple[str, Any]], stage: Any) -> list[Any]:
    """A stage's own work, without Ray."""
    from infra.store.opening import open_store
    from pipelines.engine.ray_shards import perform

    return [perform(stage, action, open_store(uri)) for uri, action in todo]


def numbers_of(table: Any) -> list[int]:
    """Places in the list of a slice's rows."""
    return [int(url.rpartition("/")[2].removesuffix(".jpg")) for url in table["url"].to_pylist()]
