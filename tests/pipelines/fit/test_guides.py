"""Classifier and noised CLIP on their way through the workflow: label columns, recipe sections, stages, the bundle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.errors import Refused
from infra.records.commits import commit
from infra.records.manifest import Action, Manifest, Record
from infra.store.base import Store
from infra.store.opening import open_store
from infra.tracking.monitor import NullMonitor
from pipelines.embed.stage import Embed, EmbedSpec
from pipelines.recipe import schema as recipe
from pipelines.recipe import stages as workflow
from pipelines.release.open import open_release
from pipelines.select.rules import ClipScore, ExactDuplicates
from pipelines.select.stage import FeatureStage, Select
from pipelines.shapes.links import parse_path
from pipelines.shapes.lists import LABELS, training_list, write_list
from pipelines.shapes.oracle import read
from pipelines.shapes.server import serve
from pipelines.source.stage import Columns
from pipelines.stage import plain
from tests.fixtures.fits import tiny
from tests.fixtures.release import SAMPLING, write_parts
from tests.fixtures.stages import clip, download, make, source
from training.cost import parameters
from training.data.batches import Data, Reads, picture
from training.data.labels import Labels, class_table
from training.job import FitHow
from training.launch import train_local
from unclip import UnCLIP
from unclip.release.model import load_model

KEEP = "source.columns.keep=[background, shape]"
CLASSIFIER = "classifier={labels: [background], train: {steps: 60, batch: 32}}"
NOISED_CLIP = "noised_clip={train: {steps: 7}, cpus: 0.5}"


def stages(*changes: str) -> dict[str, Any]:
    inputs = workflow.Inputs("list.parquet", ("0" * 64,), str(recipe.FOLDER / "prompts.jsonl"), None)
    return {stage.name: stage for stage in workflow.stages(recipe.load("tiny", changes), inputs)}


# Recipe and stages ---------------------------------------------------------------------------------------------------


def test_guides_are_stages_of_their_own_and_change_no_others_key():
    bare, guided = stages(), stages(KEEP, CLASSIFIER, NOISED_CLIP)
    assert set(guided) - set(bare) == {"classifier", "noised-clip"}
    unchanged = set(bare) - {"source", "bundle"}
    assert all(plain(guided[name].spec) == plain(bare[name].spec) for name in unchanged)
    assert plain(guided["bundle"].spec) == plain(bare["bundle"].spec)
    assert guided["bundle"].models == (*bare["bundle"].models, "classifier", "noised-clip")
    assert guided["classifier"].needs == ("embed", "curate")
    assert guided["noised-clip"].needs == ("embed", "curate", "clip")
    assert guided["noised-clip"].how.cpus == 0.5


def test_a_guide_is_made_for_the_recipes_decoder_and_clip():
    changes = ("embed.base=8", "decoder.model.attention=[4]", "decoder.model.schedule=linear",
               "classifier.model.attention=[4]", "noised_clip.model.attention=[]")  # fmt: skip
    made = workflow.models(recipe.load("tiny", [KEEP, CLASSIFIER, NOISED_CLIP, *changes]))
    assert made["classifier"].labels == ("background",)
    assert made["noised-clip"].embedding == made["decoder"].embedding
    for guide in ("classifier", "noised-clip"):
        assert (made[guide].size, made[guide].schedule, made[guide].timesteps) == (8, "linear", 1000)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ([CLASSIFIER], r"names background: name it in source\.columns\.keep"),
        ([KEEP, "classifier={labels: [], train: {steps: 1}}"], r"classifier\.labels is empty"),
        ([KEEP, "classifier={train: {steps: 1}}"], r"classifier\.labels is missing"),
        ([KEEP, CLASSIFIER, "classifier.model.size=32"], r"classifier\.model\.size is no known key"),
        ([KEEP, CLASSIFIER, "classifier.train.snr_cap=3"], r"classifier\.train\.snr_cap is no known key"),
        (["sampling.decoder.clip_guidance=2"], "add a section `noised_clip`"),
        (["sampling.decoder.labels={shape: circle}"], "has shape, which `classifier.labels` does not name"),
        (
            [KEEP, CLASSIFIER, "sampling.decoder.labels={shape: circle}"],
            "has shape, which `classifier.labels` does not name",
        ),
        ([NOISED_CLIP, "sampling.decoder.clip_guidance=-1"], "clip_guidance must be"),
    ],
)
def test_impossible_guides_are_refused_with_their_place(changes, reason):
    with pytest.raises(Refused, match=reason):
        recipe.load("tiny", changes)


def test_a_plan_can_count_a_guides_parameters():
    made = stages(KEEP, CLASSIFIER, NOISED_CLIP)
    counts = {name: parameters(made[name].model, made[name].spec.model) for name in ("classifier", "noised-clip")}
    # Before there are data there are no classes; the noised CLIP has a last layer of 32 to 32, and its logit scale.
    assert counts["noised-clip"] - counts["classifier"] == 32 * (32 + 1) + 1


# Labels through the data side ----------------------------------------------------------------------------------------


class Labelled:
    """150 rows of the shapes world, faults included, whose list has label columns: from the web server to curate."""

    def __init__(self, folder: Path, port: int) -> None:
        self.store = open_store(str(folder / "store"))
        write_list(folder / "list.parquet", 150, seed=3, pairs=0.3, labels=True)
        listed = make(self.store, source(folder / "list.parquet", columns=Columns(keep=LABELS)))
        fetched = make(self.store, download(port), listed)
        rules = (ExactDuplicates(),)
        chosen = make(
            self.store, Select("filter", rules), make(self.store, FeatureStage("filter", rules), fetched), fetched
        )
        self.clip = clip(self.store)
        self.rows = make(self.store, Embed(EmbedSpec(base=32)), fetched, chosen, self.clip)
        best = (ClipScore(top_fraction=0.7),)
        self.kept = make(
            self.store, Select("curate", best), make(self.store, FeatureStage("curate", best), self.rows), self.rows
        )

    def job(self, stage: Any) -> Any:
        """The fit that a stage of the tiny recipe would start on these rows."""
        from training.job import Job

        data = {"rows": self.rows.version, "selection": self.kept.version, "clip": self.clip.version}
        model = {**stage.spec.model, "size": 32, "attention": [16]}
        return Job(stage.name, stage.name, stage.model, model, stage.spec.train, data)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Labelled]:
    with serve(slow=0.1) as server:
        yield Labelled(tmp_path_factory.mktemp("labelled"), server.port)


def test_a_list_without_labels_is_as_it_was():
    assert training_list(50, seed=1, labels=True).select(["url", "caption", "source"]).equals(training_list(50, seed=1))


@pytest.mark.slow
def test_labels_reach_the_trainer_by_uid_through_every_filter(world: Labelled):
    """Rows are lost on the web, as duplicates and by score; what is left has the labels of its own URL, and a picture
    in which the oracle, which shares nothing with any of this, sees the same."""
    import pyarrow.parquet as pq

    from infra.records.objects import object_name

    urls = {}
    for record in world.rows.records:
        table = pq.read_table(world.store.local(object_name(record.sha("rows.parquet"))), columns=["uid", "url"])
        urls |= dict(zip(table["uid"].to_pylist(), table["url"].to_pylist(), strict=True))
    assert world.kept.states["kept"] < len(urls) < 150
    empty = Data(world.store, world.rows.version, world.kept.version, Reads(labels=Labels(LABELS)))
    places = [(place.index, list(urls)) for place in empty.places]
    labels = Labels(LABELS, class_table(world.store, places, LABELS))
    assert labels.classes[0] == ("circle", "cross", "square", "triangle")
    reads = Reads(labels=labels, image=lambda data, uid: picture(data, uid, size=32))
    data = Data(world.store, world.rows.version, world.kept.version, reads)
    rows = [(block, row) for block, count in enumerate(data.counts) for row in range(count)][::-1]
    batch = data.batch(rows, seed=0)
    assert len(batch) == world.kept.states["kept"]
    seen: Counter[bool] = Counter()
    for uid, numbers, image in zip(batch.uids, batch.tensors["labels"].tolist(), batch.tensors["image"], strict=True):
        said = {
            name: classes[number]
            for name, classes, number in zip(LABELS, labels.classes, numbers, strict=True)
            if number >= 0
        }
        link = parse_path(urls[uid].partition(".test")[2])
        assert link is not None
        assert said == {name: value for name, value in link.scene.attributes.items() if name in LABELS}
        shown = read(image.permute(1, 2, 0).numpy())
        if shown.objects and "shape" in said:
            seen[(shown.objects[0].shape, shown.background) == (said["shape"], said["background"])] += 1
    assert seen[True] > 0.9 * seen.total() > 20


@pytest.mark.slow
def test_a_classifier_learns_the_worlds_labels(world: Labelled, tmp_path: Path):
    """The tiny model after 60 steps knows at little noise which of four backgrounds it sees; at chance 1/4."""
    job = world.job(stages(KEEP, CLASSIFIER, "classifier.train.lr=1e-2", "classifier.train.warmup=5")["classifier"])
    facts = train_local(job, FitHow(), world.store, tmp_path, NullMonitor())
    assert facts["classes"] == {"background": 4}
    model: Any = load_model(tmp_path, "classifier")
    labels = Labels(model.config.labels, model.config.classes)
    reads = Reads(labels=labels, image=lambda data, uid: picture(data, uid, size=32))
    data = Data(world.store, world.rows.version, world.kept.version, reads)
    batch = data.batch([(block, row) for block, count in enumerate(data.counts) for row in range(count)], seed=0)
    x0 = batch.tensors["image"] / 127.5 - 1
    t = torch.full((len(x0),), 100)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    right = model(model.schedule.q_sample(x0, noise, t), t)[0].argmax(1) == batch.tensors["labels"][:, 0]
    assert float(right.float().mean()) > 0.6


# The bundle ----------------------------------------------------------------------------------------------------------


def put(store: Store, name: str, folder: Path) -> Manifest:
    """A folder as the only record of a stage."""
    action = Action(f"{name}/1", {}, ())
    manifest = Manifest(action, (commit(store, action, Record.of(action, folder), folder),))
    manifest.save(store)
    return manifest


@pytest.mark.slow
def test_a_bundle_with_guides_opens_with_guides(tmp_path: Path, monkeypatch):
    """Guides that were trained one step, with the other models of the tiny release at random."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = tiny(tmp_path / "store")
    given = {name: put(rows.store, name, folder) for name, folder in write_parts(tmp_path / "parts").items()}
    for name in ("classifier", "noised-clip"):
        job = rows.job(name.replace("-", "_"), key=name, steps=1, batch=2)
        job = replace(job, data={**job.data, "clip": given["clip"].version})
        train_local(job, FitHow(), rows.store, tmp_path / name, NullMonitor())
        given[name] = put(rows.store, name, tmp_path / name)
    bundle = stages(KEEP, CLASSIFIER, NOISED_CLIP, "sampling.decoder.clip_guidance=2")["bundle"]
    data = Manifest.load(rows.store, rows.embed)
    release = make(rows.store, bundle, *(given.get(need, data) for need in bundle.needs))
    model = UnCLIP.load(open_release(rows.store, release.version))
    assert list(model.guides.models) == ["classifier", "noised-clip"]
    assert model.sampling["decoder"].clip_guidance == 2
    assert set(model.sampling) == set(SAMPLING)
