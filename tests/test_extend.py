"""docs/extend.md is true: its examples, imported as a plug-in, add one of each kind, and each is used."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from infra import cluster
from infra.errors import Refused
from infra.plugins import VARIABLE, load_plugins
from infra.records.objects import object_name
from infra.store.opening import SCHEMES, open_store
from infra.tracking.monitor import NullMonitor
from pipelines.evaluate import scores
from pipelines.recipe import kinds as asked
from pipelines.recipe import schema as recipes
from pipelines.recipe import sections
from pipelines.recipe import stages as workflow
from pipelines.select.rules import RULES
from pipelines.select.stage import FeatureStage, Select
from pipelines.source.kinds import SOURCES
from pipelines.source.stage import Source, SourceHow, SourceSpec
from tests.fixtures.fits import Tiny, tiny
from tests.fixtures.stages import Data, data, make  # noqa: F401  a fixture
from training import options
from training.cost import parameters
from training.job import FitHow, Job
from training.launch import train_local
from unclip.diffusion.samplers import SAMPLERS, noise_for
from unclip.diffusion.schedule import Prediction, Schedule
from unclip.diffusion.settings import Sampling
from unclip.errors import Refused as Impossible
from unclip.release import model as models
from unclip.sample import draw

PAGE = (Path(__file__).parents[1] / "docs" / "extend.md").read_text()
TABLES: tuple[Any, ...] = (
    RULES,
    workflow.STAGES,
    sections.SECTIONS,
    models.KINDS,
    options.KINDS,
    asked.KINDS,
    SAMPLERS,
    scores.METRICS,
    SOURCES,
    SCHEMES,
)


def examples() -> dict[str, str]:
    """Heading → the code below it."""
    parts = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    texts = dict(zip(parts[1::2], parts[2::2], strict=True))
    blocks = {title: re.search(r"```python\n(.*?)```", text, re.DOTALL) for title, text in texts.items()}
    return {title: block[1] for title, block in blocks.items() if block is not None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples lie as modules: `toys`, a package of all but the command, and `toy_command`."""
    folder = tmp_path_factory.mktemp("plugin")
    package = folder / "toys"
    package.mkdir()
    names = []
    for number, (title, code) in enumerate(examples().items()):
        if title == "A command":
            (folder / "toy_command.py").write_text(code)
        else:
            names.append(f"part_{number}")
            (package / f"{names[-1]}.py").write_text(code)
    (package / "__init__.py").write_text(f"from toys import {', '.join(names)}\n")
    return folder


@pytest.fixture(scope="module", autouse=True)
def plugin(folder: Path) -> Iterator[ModuleType]:
    """The plug-in, imported; afterwards all tables and the environment are as they were."""
    before = [table.copy() for table in TABLES]
    sys.path.insert(0, str(folder))
    assert load_plugins(["toys"]) == ["toys"]
    yield sys.modules["toys"]
    sys.path.remove(str(folder))
    del os.environ[VARIABLE]
    for name in [name for name in sys.modules if name.partition(".")[0] == "toys"]:
        del sys.modules[name]
    for table, rows in zip(TABLES, before, strict=True):
        table.clear()
        table.extend(rows) if isinstance(table, list) else table.update(rows)


def stages(*changes: str) -> dict[str, Any]:
    """The stages of the tiny recipe with these changes, by name."""
    inputs = workflow.Inputs("list.parquet", ("0" * 64,), str(recipes.FOLDER / "prompts.jsonl"), None)
    return {stage.name: stage for stage in workflow.stages(recipes.load("tiny", changes), inputs)}


def test_every_kind_has_its_example_and_short_lines() -> None:
    assert len(examples()) == 8
    assert max(map(len, PAGE.splitlines())) <= 100


def test_the_tables_of_kinds_have_the_same_rows() -> None:
    assert options.KINDS.keys() == asked.KINDS.keys() == models.KINDS.keys() | {"clip"}


def test_a_rule_selects_rows_of_a_recipe(data: Data) -> None:  # noqa: F811
    rules = "filter.rules=[{rule: size, min_side: 64}, {rule: shouting, most: 0}]"
    made = stages(rules)
    look, select = made["filter-look"], made["filter"]
    assert (type(look), type(select)) == (FeatureStage, Select)
    chosen = make(data.store, select, make(data.store, look, data.download), data.download)
    shouted = 0
    for record in data.download.records:
        index = pq.read_table(data.store.local(object_name(record.sha("index.parquet"))))
        selection = chosen.only.sha(f"{record.sha('index.parquet')}.parquet")
        found = pq.read_table(data.store.local(object_name(selection)))
        marked = dict(zip(found["uid"].to_pylist(), found["rule"].to_pylist(), strict=True))
        for row in index.to_pylist():
            if row["uid"] in marked and marked[row["uid"]] != "size":
                assert (marked[row["uid"]] == "shouting") == any(map(str.isupper, row["caption"]))
                shouted += marked[row["uid"]] == "shouting"
    assert chosen.states.get("shouting", 0) == shouted
    with pytest.raises(Refused, match=r"filter\.rules\.1\.least is no known key; known keys: .*most"):
        stages("filter.rules=[{rule: size, min_side: 64}, {rule: shouting, least: 0}]")


def test_a_stage_is_in_the_graph_where_its_section_is_in_the_recipe(data: Data) -> None:  # noqa: F811
    assert "words" not in stages()
    words = stages("words={letters: 4}")["words"]
    made = make(data.store, words, data.download)
    captions = [
        text or ""
        for record in data.download.records
        for text in pq.read_table(data.store.local(object_name(record.sha("index.parquet"))))["caption"].to_pylist()
    ]
    expected = sum(len(word) >= 4 for text in captions for word in text.split())
    assert sum(record.facts["words"] for record in made.records) == expected > 0


def test_a_section_is_checked_as_all_are() -> None:
    assert recipes.load("tiny", ["words={letters: 4}"]).sections["words"].letters == 4
    for change, named in (("{letters: many}", r"words\.letters.*\"many\""), ("{leters: 4}", "did you mean 'letters'")):
        with pytest.raises(Refused, match=f"^Recipe tiny: .*{named}"):
            recipes.load("tiny", [f"words={change}"])
    with pytest.raises(Refused, match="sections is no known key"):
        recipes.load("tiny", ["sections={}"])


def test_what_a_plugin_does_not_do_changes_no_key() -> None:
    plain, named = stages(), stages("plugins=[toys]")
    for name, stage in plain.items():
        if name != "evaluate":  # whose metrics are one more
            assert (stage.spec, stage.needs) == (named[name].spec, named[name].needs)
    assert named["evaluate"].spec == {"metrics": ["kid"]}
    with pytest.raises(Refused, match="plug-in 'no_such_module' cannot be imported"):
        stages("plugins=[no_such_module]")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("world"))


def test_a_model_is_trained_by_its_objective_and_saved_as_others_are(world: Tiny, tmp_path: Path) -> None:
    made = stages("linear={train: {steps: 3}, workers: 1}")
    fit = made["linear"]
    assert (fit.model, fit.needs, fit.section) == ("linear", ("embed", "curate"), "linear")
    assert "linear" not in made["bundle"].needs
    width = fit.spec.model["embedding"]
    assert parameters("linear", fit.spec.model) == width * (width + 1)
    train = {**fit.spec.train, "batch": 8, "steps": 3}
    job = Job("linear", "k", "linear", {"embedding": 32}, train, {"rows": world.embed, "selection": world.curate})
    train_local(job, FitHow(), world.store, tmp_path, NullMonitor())
    loaded: Any = models.load_model(tmp_path, "linear")
    assert loaded(torch.zeros(2, 32)).shape == (2, 32)


def test_a_sampler_draws_and_says_which_settings_it_takes() -> None:
    schedule = Schedule.named("cosine")

    def denoise(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        return Prediction(x0=x / 2, eps=x, fraction=None)

    drawn = draw("prior", denoise, schedule, [0, 1], (4,), Sampling("one_step", 4), torch.device("cpu"))
    assert torch.equal(drawn, noise_for([0, 1], (4,), stream="prior")(0) / 2)
    assert Sampling("one_step", 4, eta=0.5).options(pictures=False) == {"eta": 0.5}
    with pytest.raises(Impossible, match="variance is a setting of ddpm; one_step has none"):
        Sampling("one_step", variance="fixed_large")


def test_a_metric_is_in_the_scores() -> None:
    noise = np.random.default_rng(0)
    rows = [
        {
            "prompt": f"{number}",
            "kind": "single",
            "seed": number,
            **dict.fromkeys(("verdict", "floor_verdict", "true_verdict", "zero_shot")),
            "clip_score": 0.3,
            "embedding": noise.normal(size=8),
            "true_embedding": noise.normal(size=8),
        }
        for number in range(5)
    ]
    flat = scores.flat(scores.score(rows, "0" * 64))
    assert flat["kid"] == flat["single.kid"] > 0
    scores.check_name("single.kid", ["single"], judge=False, reference=True)
    with pytest.raises(Refused, match="kid compares with true pictures"):
        scores.check_name("kid", ["single"], judge=False, reference=False)


def test_a_source_is_read_and_cut(data: Data, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "list.txt"
    path.write_text("".join(f"http://a.test/{number} a caption, {number}\n" for number in range(50)))
    recipe = recipes.load("tiny", [f"source.uri=lines://{path}"])
    how = SourceHow(uri=recipe.source.uri)
    stage = Source(SourceSpec(rows_per_shard=20), how, how.digests(recipe.columns))
    made = make(data.store, stage)
    tables = [pq.read_table(data.store.local(object_name(made.only.sha(name)))) for name in made.only.facts["slices"]]
    assert pa.concat_tables(tables)["caption"].to_pylist()[7] == "a caption, 7"
    assert how.fetched
    with pytest.raises(Refused, match="no plug-in adds a kind of source 'line'"):
        recipes.load("tiny", ["source.uri=line://x"])


def test_a_store_is_opened_by_its_scheme(tmp_path: Path) -> None:
    store = open_store(f"toy://{tmp_path}")
    assert store.put_new("a/b", b"c")
    assert open_store(store.uri).get("a/b") == b"c"
    with pytest.raises(Refused, match="unknown scheme 'toys'"):
        open_store("toys://x")


def test_a_command_is_among_the_others(folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(folder), VARIABLE: "toy_command"}

    def unclip(*words: str) -> str:
        command = [sys.executable, "-m", "pipelines.cli", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert "Lists the kinds of model that can be trained." in unclip("--help")
    assert unclip("kinds").split() == [kind for kind in options.KINDS if kind != "linear"]


@pytest.mark.ray
def test_workers_import_plugins_before_their_first_task(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", str(folder))
    cluster.connect(cpus=1, dashboard=False)
    try:
        import ray

        asked = textwrap.dedent("""
            from infra.store.opening import open_store
            from unclip.diffusion.settings import Sampling

            found = open_store(uri).uri, Sampling("one_step").sampler
        """)

        @ray.remote
        def look(code: str, uri: str) -> Any:
            known = {"uri": uri}
            exec(code, known)
            return known["found"]

        assert ray.get(look.remote(asked, f"toy://{tmp_path}")) == (f"toy://{tmp_path}", "one_step")
    finally:
        cluster.disconnect()


def test_old_names_of_settings_work_with_a_notice(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["download.again=1", "download.apart=true", "upsamplers.32.patience_s=7"]
    recipe = recipes.load("tiny", changes)
    assert (recipe.download.retry_pass, recipe.download.isolate) == (1, True)
    assert recipe.upsamplers[32].store_wait_s == 7
    said = capsys.readouterr().err
    assert "unclip: download.again is called download.retry_pass now; the old name works until 1.0\n" in said
    assert "upsamplers.32.patience_s is called upsamplers.32.store_wait_s now" in said
    assert len(said.splitlines()) == 3
    with pytest.raises(Refused, match=r"download\.again is download\.retry_pass now, and both are given"):
        recipes.load("tiny", ["download.again=1", "download.retry_pass=1"])


def test_every_renamed_setting_is_in_no_key() -> None:
    """Only what is a how may have another name."""
    from pipelines.download.stage import DownloadHow
    from pipelines.recipe.renamed import RENAMED

    for old, new in RENAMED.items():
        how = DownloadHow if old.startswith("download.") else FitHow
        assert new in how.__dataclass_fields__
        assert old.rpartition(".")[2] not in how.__dataclass_fields__
