"""What a run would do, before it does it: shards present and to do, the reason, and each model's parameters."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from infra.records import Action, Manifest
from infra.store import Store
from pipelines.engine.graph import order, resolve, why
from pipelines.stage import Stage, plain

PLAN_BYTES = 1 << 30
"""Of a source that is new or has changed, a plan reads as many bytes, to say exactly what is to do."""


@dataclass(frozen=True)
class Line:
    """One stage of a plan. shards, present and todo count actions; with at_most, todo is a bound. None: not known."""

    stage: str
    shards: int | None
    present: int
    todo: int | None
    at_most: bool
    why: str
    parameters: int | None


def plan(stages: Sequence[Stage], store: Store) -> list[Line]:
    """A line a stage, in order. Reads the store and changes nothing."""
    known: dict[str, Manifest] = {}
    shards: dict[str, int | None] = {}
    lines = []
    for stage in order(stages):
        if unread := getattr(stage, "unread", ""):
            lines.append(Line(stage.name, 1, 0, 1, True, unread, None))
            shards[stage.name] = None
        elif all(need in known for need in stage.needs):
            inputs = [known[need] for need in stage.needs]
            resolved = resolve(stage, inputs, store)
            todo, present = len(resolved.todo), len(resolved.actions) - len(resolved.todo)
            if not todo:
                known[stage.name] = resolved.manifest()
            elif _previewable(stage):
                known[stage.name] = _preview(stage, resolved.todo[0], store)
            reason = why(stage, resolved.whole, store) if todo else ""
            lines.append(Line(stage.name, present + todo, present, todo, False, reason, _parameters(stage)))
            shards[stage.name] = present + todo
            if stage.name == "source":
                shards[stage.name] = len(known["source"].only.files) if "source" in known else None
        else:
            behind = [need for need in stage.needs if need not in known]
            count = shards_of(stage, shards)
            whole = Action(f"{stage.name}/{stage.version}", plain(stage.spec), ())
            spec_only = [text for text in why(stage, whole, store).split("; ") if " → " in text]
            reason = "; ".join([*spec_only, f"behind {', '.join(behind)}"])
            lines.append(Line(stage.name, count, 0, count, True, reason, _parameters(stage)))
            shards[stage.name] = count
    return lines


def shards_of(stage: Stage, shards: dict[str, int | None]) -> int | None:
    """How many actions a stage has whose inputs are not there yet: a map has one for each shard it maps over."""
    count = getattr(stage, "shards", None)
    if count is not None:
        return count
    over = getattr(stage, "maps", "")
    return shards[over] if over else 1


def _previewable(stage: Any) -> bool:
    """Whether a plan may do a stage's work for itself: it says in `preview_bytes` how much that would read."""
    size = getattr(stage, "preview_bytes", None)
    return size is not None and size() <= PLAN_BYTES


def _preview(stage: Stage, action: Action, store: Store) -> Manifest:
    """Cuts the list into slices in a temporary folder, so that what is behind it can be counted exactly."""
    with tempfile.TemporaryDirectory(prefix="unclip-plan-") as folder:
        return Manifest(action, (stage.run(action, store, Path(folder)),))


def _parameters(stage: Any) -> int | None:
    if stage.kind != "fit":
        return None
    from training.cost import parameters

    return parameters(stage.model, stage.spec.model)


def as_json(lines: Sequence[Line]) -> dict[str, Any]:
    """`{"stages": [{"stage", "shards", "present", "todo", "at_most", "why", "parameters"}]}`."""
    return {"stages": [asdict(line) for line in lines]}


def as_table(lines: Sequence[Line]) -> Table:
    """The plan as a person reads it."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title, justify in (("stage", "left"), ("shards", "right"), ("present", "right"), ("to do", "right"),
                           ("parameters", "right"), ("why", "left")):  # fmt: skip
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for line in lines:
        todo = "not known" if line.todo is None else f"at most {line.todo}" if line.at_most else str(line.todo or "")
        size = "" if line.parameters is None else _millions(line.parameters)
        style = "dim" if line.todo == 0 else ""
        table.add_row(
            line.stage,
            "?" if line.shards is None else str(line.shards),
            str(line.present),
            todo,
            size,
            line.why,
            style=style,
        )
    return table


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
