"""The report: one HTML page about one release, for people. What went in, what became of it, how good it is, and how to
use it. It is self-contained and deterministic: equal inputs give equal bytes, so no times and no paths stand in it.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.documents import digest_file
from infra.records import Action, Manifest, Record, object_name, read_object
from infra.store import Store
from pipelines.engine import reconcile
from pipelines.evaluate import scores
from pipelines.fit import CHAIN, STEPS
from pipelines.promote import PROMOTION, VERDICT
from pipelines.release import CHAMPION
from pipelines.reports.examples import examples
from pipelines.reports.page import TEMPLATES, render, stage_line, thumbnail
from pipelines.select import ROW_SOURCES
from pipelines.stage import StageBase

TEMPLATE = TEMPLATES / "report.html.j2"
PAGE = "report.html"
GRIDS = {"failures": "What the judge found wrong"}


@dataclass(frozen=True)
class Report(StageBase):
    """Stage: everything → `report.html`."""

    name = group = "report"
    needs = (*CHAIN, "clip", "statistics", "bundle", "evaluate", "gate", "promote")
    spec = how = None

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        """One in all; another template makes another page."""
        yield self.action({"template": digest_file(TEMPLATE)}, (manifest.version for manifest in inputs))

    def run(self, action: Action, store: Store, out: Path) -> Record:
        stages = {
            name: Manifest.load(store, version, name) for name, version in zip(self.needs, action.inputs, strict=True)
        }
        (out / PAGE).write_text(render(TEMPLATE, contents(store, stages)), encoding="utf-8")
        return Record.of(action, out)


def contents(store: Store, stages: dict[str, Manifest]) -> dict[str, Any]:
    """All that the page says, as plain JSON."""
    stages = dict(stages)
    bundle, evaluate = stages["bundle"].only, stages["evaluate"].only
    release = _json(store, bundle, "release.json")
    measured = scores.read(store.get(object_name(evaluate.sha("scores.json"))))
    final = reconcile(*(stages[name] for name in CHAIN))
    models = sorted(name for name in release["components"] if name not in stages)
    made_of = {name: Manifest.load(store, release["data"][name], name) for name in models}
    ends = {name: stages.pop(name) for name in ("bundle", "evaluate", "gate", "promote")}
    return {
        "name": release["name"],
        "champion": CHAMPION,
        "version": ends["bundle"].version,
        "promotion": _json(store, ends["promote"].only, PROMOTION),
        "verdict": _json(store, ends["gate"].only, VERDICT),
        "rows": stages["source"].rows,
        "final": _final(final, stages["source"].rows),
        "waterfall": _waterfall(stages),
        "rejected": _rejected(store, stages),
        "similarity": _similarity(measured),
        "headline": _headline(measured),
        "kinds": _kinds(measured),
        "zero_shot": {kind: part["zero_shot"] for kind, part in measured["kinds"].items() if part["zero_shot"]},
        "grids": _grids(store, evaluate),
        "models": _models(store, bundle, release),
        "clip": release["clip"],
        "stages": [_stage(name, manifest) for name, manifest in {**stages, **made_of, **ends}.items()],
    }


def _final(final: dict[str, int], rows: int) -> list[dict[str, Any]]:
    """Stage by stage, the states that rows ended in; what is kept comes last."""
    found: dict[str, list[dict[str, Any]]] = {}
    for state, count in final.items():
        stage, _, reason = state.rpartition(".")
        found.setdefault(stage, []).append({"state": reason, "count": count, "share": count / max(rows, 1)})
    return [
        {
            "stage": stage,
            "states": sorted(states, key=lambda one: (-one["count"], one["state"])),
            "sum": sum(one["count"] for one in states),
        }
        for stage, states in found.items()
    ]


def _waterfall(stages: dict[str, Manifest]) -> list[dict[str, Any]]:
    """How many rows were left behind each step, with the share that the step took."""
    left = [stages["source"].rows, *(stages[name].states.get("kept", 0) for name in CHAIN[1:])]
    lost = [0, *(before - after for before, after in itertools.pairwise(left))]
    labels = [STEPS[name] for name in CHAIN]
    labels[-1] += ": what the models train on"
    return [
        {"label": label, "rows": rows, "lost": gone, "share": rows / max(left[0], 1), "gone": gone / max(left[0], 1)}
        for label, rows, gone in zip(labels, left, lost, strict=True)
    ]


def _rejected(store: Store, stages: dict[str, Manifest]) -> list[dict[str, Any]]:
    """What each rule of filter and curate took: how many rows, and the first of them, with their pictures."""
    out = []
    for group, over in ROW_SOURCES.items():
        selection = stages[group]
        for rule, some in examples(store, group, stages[over.stage], selection).items():
            shown = [{"uid": one.uid, "caption": one.caption, "uri": thumbnail(one.image)} for one in some]
            out.append({"group": group, "rule": rule, "count": selection.states[rule], "examples": shown})
    return out


def _headline(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """One number a kind of prompt: everything at once right; without a judge, none."""
    return [
        {"kind": kind, "count": part["count"], **part["attributes"][scores.ALL]}
        for kind, part in measured["kinds"].items()
        if part["attributes"]
    ]


def _kinds(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Attribute by attribute, beside ceiling and floor; "all" comes first."""
    kinds = []
    for kind, part in measured["kinds"].items():
        names = sorted(part["attributes"] or (), key=lambda name: (name != scores.ALL, name))
        rows = [
            {
                "attribute": name,
                **part["attributes"][name],
                "ceiling": (part["ceiling"] or {}).get(name, {}).get("value"),
                "floor": (part["floor"] or {}).get(name, {}).get("value"),
            }
            for name in names
        ]
        kinds.append({"kind": kind, "rows": rows, "count": part["count"], **_similarity(part)})
    return kinds


def _similarity(part: dict[str, Any]) -> dict[str, float | None]:
    """What CLIP measured; None for what an older evaluation did not."""
    return {name: part.get(name) for name in scores.METRICS}


def _grids(store: Store, evaluate: Record) -> list[dict[str, str]]:
    """The picture grids as data URIs, kinds first, failures last."""
    names = sorted(
        (name for name in evaluate.files if name.startswith("grid-") and name.endswith(".png")),
        key=lambda name: (name == "grid-failures.png", name),
    )
    grids = []
    for name in names:
        kind = name.removeprefix("grid-").removesuffix(".png")
        data = base64.b64encode(store.get(object_name(evaluate.sha(name)))).decode()
        grids.append({"title": GRIDS.get(kind, f"Held-out prompts: {kind}"), "uri": f"data:image/png;base64,{data}"})
    return grids


def _models(store: Store, bundle: Record, release: dict[str, Any]) -> list[dict[str, Any]]:
    """Each model of the release: parameters, bytes, how it is sampled, and its configuration."""
    models = []
    for name, files in release["components"].items():
        weights = bundle.files[f"{name}/model.safetensors"]
        config = _json(store, bundle, f"{name}/config.json")
        settings = config.get("config") or config.get("model") or {}
        models.append(
            {
                "name": name,
                "parameters": parameters(store, weights.sha256),
                "bytes": weights.bytes,
                "sha256": files["model.safetensors"],
                "sampling": release["sampling"].get(name),
                "config": json.dumps(settings, sort_keys=True, indent=1),
            }
        )
    return models


def parameters(store: Store, sha256: str) -> int:
    """Numbers in a stored safetensors file, from its header alone."""
    name = object_name(sha256)
    (length,) = struct.unpack("<Q", store.get(name, 0, 8))
    header = json.loads(store.get(name, 8, length))
    return sum(math.prod(tensor["shape"]) for key, tensor in header.items() if key != "__metadata__")


def _stage(name: str, manifest: Manifest) -> dict[str, Any]:
    facts = [record.facts for record in manifest.records if record.facts]
    return {
        **stage_line(name, manifest),
        "facts": {
            key: value
            for key, value in (facts[0] if len(manifest.records) == 1 and facts else {}).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        },
    }


def _json(store: Store, record: Record, name: str) -> dict[str, Any]:
    return json.loads(read_object(store, record.sha(name)))
