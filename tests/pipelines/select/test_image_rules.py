"""Rules that need pictures, files or embeddings, over real shards: downloaded tars and what a CLIP made of them."""

from __future__ import annotations

import io
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import save_file

from infra.errors import Refused
from infra.records.manifest import Manifest
from infra.records.objects import object_name
from infra.records.schemas import KEPT
from pipelines.embed.stage import Embed, EmbedSpec
from pipelines.recipe import schema as recipe
from pipelines.recipe import stages as workflow
from pipelines.reports.examples import examples
from pipelines.select.rules import (
    Aesthetic,
    Blank,
    BlockedTerms,
    ClipScore,
    Contamination,
    ExactDuplicates,
    NearDuplicates,
    Nsfw,
    SemanticDuplicates,
    Size,
    opened,
)
from pipelines.select.rules.image import phash
from pipelines.select.stage import FeatureStage, Select
from pipelines.shapes.links import parse_path
from tests.fixtures.stages import RULES, Data, clip, make


def read(data: Data, sha256: str) -> list[dict]:
    return pq.read_table(data.store.local(object_name(sha256))).to_pylist()


def kept(data: Data) -> list[dict]:
    """Downloaded rows in manifest order, with the rule that the filter below marked them with, and their picture."""
    rows = []
    for record in data.download.records:
        tar = data.store.get(object_name(record.sha("images.tar")))
        for row in read(data, record.sha("index.parquet")):
            if row["state"] == KEPT:
                image = Image.open(io.BytesIO(tar[row["offset"] : row["offset"] + row["length"]]))
                rows.append({**row, "phash": phash(image.convert("RGB"))})
    return rows


def select(data: Data, group: str, over: Manifest, *rules) -> Manifest:
    return make(data.store, Select(group, rules), make(data.store, FeatureStage(group, rules), over), over)


def marks(data: Data, over: Manifest, selection: Manifest, file: str) -> list[str | None]:
    names = [f"{record.sha(file)}.parquet" for record in over.records]
    return [row["rule"] for name in names for row in read(data, selection.only.sha(name))]


def test_near_duplicates_and_evaluation_pictures_are_found_in_downloaded_tars(data: Data, tmp_path: Path) -> None:
    rows = kept(data)
    probe = rows[17]
    record = next(r for r in data.download.records if probe in [{**row, "phash": probe["phash"]} for row in
                  read(data, r.sha("index.parquet"))])  # fmt: skip
    body = data.store.get(object_name(record.sha("images.tar")), probe["offset"], probe["length"])
    Image.open(io.BytesIO(body)).convert("RGB").resize((90, 90)).save(tmp_path / "held-out.jpg", quality=70)
    rules = (
        BlockedTerms(terms=("tiny",)),
        Contamination(images=str(tmp_path), max_distance=4),
        ExactDuplicates(),
        NearDuplicates(max_distance=2),
        Blank(),
    )
    rules = tuple(opened(rule) for rule in rules)
    selection = select(data, "filter", data.download, *rules)

    hidden, seen, hashes, expected = phash(Image.open(tmp_path / "held-out.jpg")), set(), list[int](), []
    for row in rows:
        if "tiny" in row["caption"].lower().split():
            expected.append("blocked_terms")
        elif (row["phash"] ^ hidden).bit_count() <= 4:
            expected.append("contamination")
        elif row["sha256"] in seen:
            expected.append("exact_duplicates")
        elif any((row["phash"] ^ one).bit_count() <= 2 for one in hashes):
            expected.append("near_duplicates")
        else:
            expected.append(None)
            hashes.append(row["phash"])
        if expected[-1] in (None, "near_duplicates"):
            seen.add(row["sha256"])
    assert marks(data, data.download, selection, "index.parquet") == expected
    assert expected[17] == "contamination"
    assert {"exact_duplicates", "contamination", None} <= set(expected)
    repeated = [parse_path(urlsplit(row["url"]).path).fault == "duplicate" for row in rows]
    assert not any(again and mark is None for again, mark in zip(repeated, expected, strict=True))


def test_rules_that_look_at_no_picture_read_no_tar_and_keep_their_keys(data: Data) -> None:
    (plain, *_) = FeatureStage("filter", RULES).actions(data.download)
    (looking, *_) = FeatureStage("filter", (*RULES, Blank())).actions(data.download)
    record = data.download.records[0]
    assert plain.inputs == (record.sha("index.parquet"),)
    assert looking.inputs == (record.sha("index.parquet"), record.sha("images.tar"))


def test_examples_are_the_first_rows_of_each_rule_with_their_pictures(data: Data) -> None:
    found = examples(data.store, "filter", data.download, data.filter, most=2)
    assert set(found) == set(data.filter.states) - {KEPT}
    taken = [
        row["uid"].hex()
        for row, mark in zip(kept(data), marks(data, data.download, data.filter, "index.parquet"), strict=True)
        if mark == "exact_duplicates"
    ]
    shown = found["exact_duplicates"]
    assert [one.uid for one in shown] == taken[:2]
    assert all(one.image is not None and one.image.mode == "RGB" and one.caption for one in shown)


def test_embeddings_are_judged_in_curate(data: Data, tmp_path: Path) -> None:
    embed = make(data.store, Embed(EmbedSpec(base=32, batch=16)), data.download, data.filter, clip(data.store))
    z = np.array([row["image_embedding"] for record in embed.records for row in read(data, record.sha("rows.parquet"))])
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    weight = np.linspace(-1, 1, z.shape[1], dtype=np.float32)
    save_file({"weight": weight[None], "bias": np.zeros(1, np.float32)}, tmp_path / "head.safetensors")
    np.save(tmp_path / "set.npy", z[[5]] * 3)
    median = float(np.median(z @ weight))
    rules = (
        Contamination(embeddings=str(tmp_path / "set.npy"), min_cosine=0.99999),
        Aesthetic(head=str(tmp_path / "head.safetensors"), min_score=median),
        SemanticDuplicates(min_cosine=0.999, clusters=2),
        ClipScore(top_fraction=0.9),
    )
    selection = select(data, "curate", embed, *(opened(rule) for rule in rules))
    found = marks(data, embed, selection, "rows.parquet")
    assert found[5] == "contamination"
    assert [mark == "aesthetic" for mark in found] == [
        score < median and near < 0.99999 for score, near in zip(z @ weight, z @ z[5], strict=True)
    ]
    stays = z[[mark in (None, "clip_score") for mark in found]]
    for row, mark in zip(z, found, strict=True):
        if mark == "semantic_duplicates":
            assert (stays @ row).max() > 0.998  # float16
    shown = examples(data.store, "curate", embed, selection, most=1)["aesthetic"]
    assert [one.image.size for one in shown if one.image] == [(32, 32)]


def test_rules_are_sent_where_what_they_read_is() -> None:
    for rule in (SemanticDuplicates(min_cosine=0.9), Aesthetic(head="h", min_score=0), Contamination(embeddings="e")):
        with pytest.raises(Refused, match=r"reads image_embedding, which .* put it under curate\.rules"):
            FeatureStage("filter", (rule,))
    for rule in (Blank(), NearDuplicates(), Contamination(images="i"), Size(min_side=1)):
        with pytest.raises(Refused, match=r"which the rows of embed do not have; put it under filter\.rules"):
            Select("curate", (rule,))
    with pytest.raises(Refused, match=r"nsfw reads punsafe, .* name the list's column in source\.columns\.keep"):
        FeatureStage("filter", (Nsfw(column="punsafe", max_score=0.5),))
    FeatureStage("filter", (Nsfw(column="punsafe", max_score=0.5),), ("punsafe",))


def test_a_recipe_names_the_file_whose_digest_is_in_the_key(tmp_path: Path) -> None:
    terms = tmp_path / "terms.txt"
    terms.write_text("one term\n")

    prompts = sorted(recipe.FOLDER.glob("*.jsonl"))[0]
    read = recipe.load("demo", [f"filter.rules=[{{rule: blocked_terms, file: {terms}}}]"])
    made = workflow.stages(read, workflow.Inputs("list.parquet", ("0" * 64,), str(prompts), None))
    (rule,) = next(stage for stage in made if stage.name == "filter").spec.rules
    assert rule.sha256
    assert rule.content == terms.read_bytes()
    terms.unlink()
    with pytest.raises(Refused, match=r"filter\.rules\.0: .*terms\.txt cannot be read"):
        workflow.stages(read, workflow.Inputs("list.parquet", ("0" * 64,), str(prompts), None))
    with pytest.raises(Refused, match=r"filter\.rules\.0\.content is no known key"):
        recipe.load("demo", ["filter.rules=[{rule: blocked_terms, terms: [x], content: y}]"])
