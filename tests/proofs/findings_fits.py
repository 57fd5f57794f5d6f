"""The variants that the findings compare, trained on the demo's own data beside the demo's own models.

A variant is the demo's fit of one model with some settings changed: the same action in the same store, so that what has
a record is not trained again, and a fit that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch.utils.flop_counter import FlopCounterMode

from infra.records.commits import commit
from infra.records.manifest import Action, Block, Manifest, Record
from infra.records.objects import object_name
from infra.store.base import Store
from infra.store.local import LocalStore
from infra.tracking.monitor import NullMonitor
from pipelines.embed.statistics import Statistics
from pipelines.fit.data_stages import ROLES
from pipelines.fit.stage import Fit, FitSpec
from pipelines.stage import plain
from training.data.batches import Batch, Data
from training.data.feed import Feed
from training.data.order import Order
from training.job import FitHow, Job
from training.launch import discard, train_local
from training.objectives.choice import objective
from training.options import KINDS
from training.parallel.flat import Group
from unclip.presets import DEMO

NEEDS = ("embed", "curate", "statistics", "clip")


@dataclass(frozen=True)
class Variant:
    """One fit: whose settings it starts from, and what differs."""

    of: str
    """The component of the release whose fit it repeats: prior, decoder or upsampler-64."""
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    times: int = 1
    """Its steps, as a multiple of the demo's."""
    autoregressive: bool = False
    """An autoregressive prior of the demo's size in the diffusion prior's place, as many steps as cost it the same."""
    of_text: bool = False
    """The data says z_t wherever it said z_i."""


AGAIN = {"seed": 1}
VARIANTS = {
    "decoder-learned": Variant("decoder", model={"learned_range": True}),
    "decoder-caption": Variant("decoder", train={"drop_image": 1.0, "drop_text": 0.1}),
    "ar-prior": Variant("prior", autoregressive=True),
    "upsampler-plain": Variant("upsampler-64", train={"corruption": "none"}),
    "ar-prior-long": Variant("prior", autoregressive=True, times=2),
    "prior-long": Variant("prior", times=2),
    "decoder-text": Variant("decoder", of_text=True),
    "upsampler-again": Variant("upsampler-64", train=AGAIN),
    "upsampler-plain-again": Variant("upsampler-64", train={"corruption": "none", **AGAIN}),
}
"""All that is trained beside the demo's release."""


@dataclass(frozen=True)
class Plan:
    """A fit as the trainer is asked for it."""

    kind: str
    model: dict[str, Any]
    train: dict[str, Any]
    data: dict[str, str]


def planned(store: LocalStore, release: Path, variant: Variant) -> Plan:
    """What is asked of the trainer for a variant; for `Variant("prior")` and so on, what the demo asked."""
    said = json.loads((release / variant.of / "config.json").read_text())
    kind, data = said["kind"], dict(said["facts"]["data"])
    if variant.of_text:
        data |= text_for_image(store, data)
    model, train = said["config"] | variant.model, said["train"] | variant.train
    train["steps"] *= variant.times
    if variant.autoregressive:
        model, train = autoregressive(store, model, train, data)
        kind = "ar_prior"
    return Plan(kind, model, plain(KINDS[kind].options(**train)), data)


def fitted(store: LocalStore, release: Path, name: str) -> Record:
    """The record of a variant's fit, trained in this process if there is none yet."""
    variant = VARIANTS[name]
    plan = planned(store, release, variant)
    fit = Fit(variant.of, plan.kind, FitSpec(plan.model, plan.train), FitHow(), NEEDS)
    (action,) = fit.actions(*(Manifest.load(store, plan.data[ROLES[need]]) for need in NEEDS))
    if store.exists(action.record_name()):
        return Record.from_json(store.get(action.record_name()))
    job = Job(name, action.key, plan.kind, plan.model, plan.train, plan.data)
    with store.scratch() as out:
        facts = train_local(job, fit.how, store, out, NullMonitor())
        record = commit(store, action, Record.of(action, out, facts=facts), out)
    discard(store, action.key)
    return record


def autoregressive(
    store: Store, prior: dict[str, Any], train: dict[str, Any], data: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(model, train) of the preset's autoregressive prior, for the compute of a diffusion prior's fit."""
    assert DEMO.ar_prior is not None
    widths = {name: prior[name] for name in ("embedding", "text_width", "context", "width", "depth", "heads")}
    model = asdict(replace(DEMO.ar_prior, **widths))
    known = set(KINDS["ar_prior"].options.__dataclass_fields__)
    options = {name: value for name, value in train.items() if name in known}
    cost = step_flops(store, Plan("prior", prior, train, data)) / step_flops(
        store, Plan("ar_prior", model, options, data)
    )
    return model, options | {"steps": round(train["steps"] * cost)}


def step_flops(store: Store, plan: Plan) -> int:
    """Floating-point operations of one training step, forward and backward."""
    task = objective(Job(plan.kind, "flops", plan.kind, plan.model, plan.train, plan.data), store, torch.device("cpu"))
    network = task.build().train()
    rows = Data(store, plan.data["rows"], plan.data["selection"], task.reads, read_text=task.read_text)
    batch = first_batch(rows, plan.train["batch"])
    with counted() as counter:
        task.loss(network, batch, Group()).loss.sum().backward()
    return counter.get_total_flops()


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """Counts the floating-point operations inside, as torch does."""
    # Attention as plain products: torch counts nothing inside the fused one of a CPU.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def first_batch(data: Data, size: int) -> Batch:
    """The first micro-batch that a fit of that batch size would see."""
    order = Order(data.counts, 1, size, 16, 0)
    with Feed(data, order, [0], 0, 1, 1, 1) as feed:
        return feed.next()


def text_for_image(store: LocalStore, data: dict[str, str]) -> dict[str, str]:
    """rows, selection and statistics of the same data with the text embedding in the image embedding's column."""
    embed, curate = Manifest.load(store, data["rows"]), Manifest.load(store, data["selection"])
    made, selections = [], {}
    for record in embed.records:
        sha = record.sha("rows.parquet")
        action = Action("findings-text-rows/1", {}, (sha,))
        with store.scratch() as out:
            table = pq.read_table(store.local(object_name(sha)))
            place = table.schema.get_field_index("image_embedding")
            table = table.set_column(place, table.schema.field(place), table["text_embedding"])
            pq.write_table(table, out / "rows.parquet", row_group_size=max(block.rows for block in record.blocks))
            blocks = [Block("rows.parquet", block.first, block.rows) for block in record.blocks]
            copy = Record.of(action, out, states=record.states, blocks=blocks, facts=record.facts)
            made.append(commit(store, action, copy, out))
        selections[made[-1].sha("rows.parquet")] = store.get(object_name(curate.only.sha(f"{sha}.parquet")))
    rows = Manifest(Action("findings-text-rows/1", {}, (embed.version,)), tuple(made))
    rows.save(store)
    selection = _reduced(store, "findings-text-selection/1", (rows.version, curate.version), selections)
    stage = Statistics()
    (action,) = stage.actions(rows, selection)
    with store.scratch() as out:
        record = commit(store, action, stage.run(action, store, out), out)
    return {
        "rows": rows.version,
        "selection": selection.version,
        "statistics": Manifest(action, (record,)).save(store),
    }


def _reduced(store: LocalStore, stage: str, inputs: tuple[str, ...], files: dict[str, bytes]) -> Manifest:
    action = Action(stage, {}, inputs)
    with store.scratch() as out:
        for sha, content in files.items():
            (out / f"{sha}.parquet").write_bytes(content)
        manifest = Manifest(action, (commit(store, action, Record.of(action, out), out),))
    manifest.save(store)
    return manifest
