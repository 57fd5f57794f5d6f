"""Rows that are whole: what embed stores of each pair."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.errors import Refused
from infra.records.commits import commit
from infra.records.manifest import Action, Block, Manifest, Record
from infra.records.objects import object_name
from infra.records.schemas import INDEX, KEPT, embedded_schema
from infra.store.base import Store
from pipelines.embed.stage import Embed, EmbedHow, EmbedSpec, base_picture, chosen_rows, load_clip, picture_tensor
from pipelines.select.stage import FeatureStage, Select
from pipelines.stage import plain
from tests.fixtures.stages import Data, clip, make
from unclip.clip.model import Clip


@pytest.fixture(scope="module")
def seen(data: Data) -> tuple[Manifest, Manifest]:
    """CLIP and embed over the shapes world."""
    made = clip(data.store)
    return made, make(data.store, stage(), data.download, data.filter, made)


def stage(batch: int = 16, **how) -> Embed:
    return Embed(EmbedSpec(base=32, batch=batch), EmbedHow(**how))


def rows(store: Store, record: Record) -> pa.Table:
    return pq.read_table(store.local(object_name(record.sha("rows.parquet"))))


def test_each_row_that_filter_keeps_is_one_whole_row(data: Data, seen):
    _, embed = seen
    assert embed.states == {KEPT: data.filter.states[KEPT]}
    for shard, record in zip(data.download.records, embed.records, strict=True):
        table = rows(data.store, record)
        assert table.schema.equals(embedded_schema(16))
        index = shard.sha("index.parquet")
        chosen = chosen_rows(data.store, index, data.filter.only.sha(f"{index}.parquet"))
        for column in ("uid", "url", "caption"):
            assert table[column].to_pylist() == chosen[column].to_pylist()
        assert not any(column.null_count for column in table.columns)


def test_embeddings_are_clips_own_and_the_score_is_their_cosine(data: Data, seen):
    made, embed = seen
    adapter = load_clip(data.store, made.version, "cpu")
    shard, record = data.download.records[0], embed.records[0]
    index = shard.sha("index.parquet")
    chosen = chosen_rows(data.store, index, data.filter.only.sha(f"{index}.parquet")).to_pylist()
    tar = data.store.local(object_name(shard.sha("images.tar"))).read_bytes()
    for place, row in enumerate(rows(data.store, record).slice(0, 5).to_pylist()):
        data_of = tar[chosen[place]["offset"] : chosen[place]["offset"] + chosen[place]["length"]]
        picture = Image.open(io.BytesIO(data_of)).convert("RGB")
        image = adapter.encode_images(picture_tensor(picture))[0].numpy()
        text = adapter.encode_text([row["caption"]]).embedding[0].numpy()
        np.testing.assert_allclose(row["image_embedding"], image, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(row["text_embedding"], text, rtol=1e-4, atol=1e-5)
        cosine = image @ text / np.linalg.norm(image) / np.linalg.norm(text)
        assert row["score"] == pytest.approx(cosine, abs=1e-5)
        stored = np.asarray(Image.open(io.BytesIO(row["image"])))
        blocks = np.asarray(picture, float).reshape(32, 4, 32, 4, 3).mean((1, 3))
        assert stored.shape == (32, 32, 3)
        assert np.abs(stored - blocks).max() <= 1  # Pillow rounds after each direction


def test_facts_name_what_a_shard_was_made_from(data: Data, seen):
    made, embed = seen
    for shard, record in zip(data.download.records, embed.records, strict=True):
        index = shard.sha("index.parquet")
        assert record.facts == {
            "tar": shard.sha("images.tar"),
            "index": index,
            "selection": data.filter.only.sha(f"{index}.parquet"),
            "clip": load_clip(data.store, made.version, "cpu").fingerprint,
            "base": 32,
        }


def test_blocks_are_row_groups(data: Data, seen):
    for record in seen[1].records:
        with pq.ParquetFile(data.store.local(object_name(record.sha("rows.parquet")))) as file:
            sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        assert [block.rows for block in record.blocks] == sizes
        assert [block.first for block in record.blocks] == [sum(sizes[:number]) for number in range(len(sizes))]
        assert max(sizes) <= 256


def shard(store: Store, pictures: list[bytes | Image.Image]) -> tuple[Manifest, Manifest]:
    """A download manifest with these pictures in one tar, and the selection that keeps them all."""
    bodies, index, offset = [], [], 0
    for place, picture in enumerate(pictures):
        out = io.BytesIO()
        if isinstance(picture, bytes):
            out.write(picture)
        else:
            picture.save(out, "PNG")
        body = out.getvalue()
        name = hashlib.sha256(f"{place}".encode()).digest()
        line = {"uid": name[:16], "url": f"http://a.test/{place}", "caption": f"picture {place}", "state": KEPT}
        sides = {"width": 64, "height": 64, "sha256": name}
        index.append({**line, "offset": offset, "length": len(body), **sides})
        bodies.append(body)
        offset += len(body)
    action = Action("download/1", {}, tuple(hashlib.sha256(body).hexdigest() for body in bodies))
    with store.scratch() as folder:
        (folder / "images.tar").write_bytes(b"".join(bodies))
        pq.write_table(pa.Table.from_pylist(index, schema=INDEX), folder / "index.parquet")
        blocks = [Block("index.parquet", 0, len(index))]
        record = commit(store, action, Record.of(action, folder, states={KEPT: len(index)}, blocks=blocks), folder)
    manifest = Manifest(action, (record,))
    return manifest, make(store, Select("filter"), make(store, FeatureStage("filter"), manifest), manifest)


def noise(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


@pytest.fixture
def store(data: Data) -> Store:
    return data.store


def test_a_row_does_not_depend_on_its_neighbours(store, seen):
    made, _ = seen
    many = [noise(seed) for seed in range(21)]
    few = [*many[:18], noise(99), noise(98, 200, 90)]
    one, other = (rows(store, make(store, stage(), *shard(store, pictures), made).only) for pictures in (many, few))
    for column in ("image_embedding", "text_embedding", "score", "image"):
        assert one[column].to_pylist()[:18] == other[column].to_pylist()[:18]


def test_pictures_that_cannot_be_used_have_a_state_and_no_row(store, seen):
    made, _ = seen
    pictures = [noise(1), b"no picture", noise(2, 64, 31), noise(3, 300, 40)]
    record = make(store, stage(), *shard(store, pictures), made).only
    assert record.states == {KEPT: 2, "undecodable": 1, "below_base": 1}
    assert rows(store, record)["url"].to_pylist() == ["http://a.test/0", "http://a.test/3"]
    assert record.rows == 4


def test_a_shard_without_any_row_is_an_empty_file(store, seen):
    made, _ = seen
    record = make(store, stage(), *shard(store, [b"no picture", b"nor this"]), made).only
    assert record.blocks == ()
    assert rows(store, record).schema.equals(embedded_schema(16))
    assert rows(store, record).num_rows == 0


def test_row_groups_hold_256_rows(store, seen):
    made, _ = seen
    small = [noise(seed, 32, 32) for seed in range(300)]
    record = make(store, stage(64), *shard(store, small), made).only
    assert [(block.first, block.rows) for block in record.blocks] == [(0, 256), (256, 44)]


@pytest.mark.parametrize("how", [{"actors": 3, "cpus": 0.5}, {"decoders": 4}])
def test_bytes_do_not_depend_on_how_many_actors_and_threads_there_are(data: Data, seen, tmp_path, how):
    made, embed = seen
    again = stage(**how)
    actions = list(again.actions(data.download, data.filter, made))
    assert [action.key for action in actions] == [record.key for record in embed.records]
    assert again.run(actions[0], data.store, tmp_path).files == embed.records[0].files


def test_settings_that_came_later_are_in_no_key_at_their_defaults():
    assert plain(EmbedSpec()) == {"base": 64, "batch": 64}
    assert plain(EmbedSpec(precision="bfloat16", lengths=(8, 16))) == {
        "base": 64, "batch": 64, "precision": "bfloat16", "lengths": [8, 16]
    }  # fmt: skip


@pytest.mark.parametrize("spec", [{"precision": "bfloat16"}, {"precision": "float16"}, {"lengths": (8, 16)}])
def test_faster_settings_give_the_same_rows_but_for_rounding(data: Data, seen, spec):
    made, embed = seen
    faster = Embed(EmbedSpec(base=32, batch=16, **spec))
    again = make(data.store, faster, data.download, data.filter, made)
    least = 0.999 if "precision" in spec else 1 - 1e-6
    for one, other in zip(embed.records, again.records, strict=True):
        assert one.key != other.key
        exact, fast = rows(data.store, one), rows(data.store, other)
        for column in ("uid", "caption", "url", "image"):
            assert exact[column].equals(fast[column])
        for column in ("image_embedding", "text_embedding"):
            a, b = (np.stack(table[column].to_pylist()) for table in (exact, fast))
            assert ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min() > least


def test_embeddings_that_overflow_are_refused_not_stored(data: Data, seen):
    adapter = load_clip(data.store, seen[0].version, "cpu")
    loud = adapter.state | {"visual.attnpool.c_proj.weight": adapter.state["visual.attnpool.c_proj.weight"] * 1e7}
    action = Action("clip/1", {"loud": True}, ())
    with data.store.scratch() as out:
        Clip(adapter.config, loud, adapter.preprocess).save(out)
        made = Manifest(action, (commit(data.store, action, Record.of(action, out), out),))
    made.save(data.store)
    one = shard(data.store, [noise(1), noise(2)])
    with pytest.raises(Refused, match="not finite in float16"):
        make(data.store, Embed(EmbedSpec(base=32, precision="float16")), *one, made)


def test_the_base_picture_is_the_central_square():
    wide = Image.new("RGB", (120, 40), "red")
    wide.paste("blue", (40, 0, 80, 40))
    made = Image.open(io.BytesIO(base_picture(wide, 20)))
    assert made.size == (20, 20)
    assert made.getcolors() == [(400, (0, 0, 255))]


def test_a_selection_of_other_data_is_refused(data: Data, store, seen):
    one, two = data.download.records[:2]
    selection = data.filter.only.sha(f"{one.sha('index.parquet')}.parquet")
    with pytest.raises(Refused, match="of another version of the data"):
        chosen_rows(store, two.sha("index.parquet"), selection)


def test_another_clip_embeds_anew(data: Data, seen):
    other = clip(data.store, seed=1)
    first, again = ({a.key for a in stage().actions(data.download, data.filter, c)} for c in (seen[0], other))
    assert first.isdisjoint(again)


def test_clip_is_loaded_once_a_process(data: Data, seen):
    assert load_clip(data.store, seen[0].version, "cpu") is load_clip(data.store, seen[0].version, "cpu")


@pytest.mark.parametrize(
    "options",
    [{"base": 0}, {"batch": 0}, {"batch": 257}, {"precision": "int8"}, {"lengths": (16, 8)}, {"lengths": (1,)}],
)
def test_impossible_specs_are_refused(options):
    with pytest.raises(Refused, match="embed"):
        EmbedSpec(**options)
