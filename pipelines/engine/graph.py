"""What is to do, in which order, and why: stages joined by their needs, compared with the records in the store.

Nothing here does work or changes the store. A stage is *resolved* once the manifests it needs are known: its actions
are then exact. Behind work still to do they are not, and the count is an upper bound ("at most").
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from infra.errors import Refused
from infra.records import Action, Manifest, Record, document, explain_damage, newest_generations, object_name
from infra.store import Store
from pipelines.stage import Stage, plain


@dataclass(frozen=True)
class Resolved:
    """A stage whose inputs are known: its actions in order and the records that are already there, by key."""

    stage: Stage
    whole: Action
    actions: tuple[Action, ...]
    present: dict[str, Record]
    newest: Manifest | None = None
    """The newest manifest of this stage and spec, where it was read: mostly the very one that `manifest` is to give."""

    @property
    def todo(self) -> tuple[Action, ...]:
        """Actions without a record, and those whose record is to have a next generation (`Download.stale`)."""
        stale = getattr(self.stage, "stale", lambda record: False)
        return tuple(
            action for action in self.actions if action.key not in self.present or stale(self.present[action.key])
        )

    def manifest(self, made: Iterable[Record] = ()) -> Manifest:
        """The stage's manifest, once every action has a record (its own or one `made` just now)."""
        records = {**self.present, **{record.key: record for record in made}}
        whole = tuple(records[action.key] for action in self.actions)
        if self.newest is not None and whole == self.newest.records:
            return self.newest
        return Manifest(self.whole, whole)


def resolve(stage: Stage, inputs: Sequence[Manifest], store: Store) -> Resolved:
    """The stage's actions on these manifests, and which of them are done.

    Costs one listing per folder of records (one in all for most stages) and reads only records that the newest
    manifest does not already hold.
    """
    with _uncollected():
        return _resolve(stage, inputs, store)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without the cycle collector: ten thousand records make no cycles, and it would go through them again and again,
    and through all that was ever imported, for as long as the records take to read."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:  # of two threads, the first to come
            gc.enable()


def _resolve(stage: Stage, inputs: Sequence[Manifest], store: Store) -> Resolved:
    actions = tuple(stage.actions(*inputs))
    whole = Action(f"{stage.name}/{stage.version}", plain(stage.spec), tuple(manifest.version for manifest in inputs))
    wanted = {action.key for action in actions}
    places = sorted({one.place for one in {id(action.spec): action for action in actions}.values()})  # one, mostly
    standing = newest_generations(entry.name for place in places for entry in store.list(f"records/{place}/"))
    found = {key: standing[key] for key in wanted & standing.keys()}
    newest_manifest = _newest_manifest(store, whole) if len(found) > 1 else None
    known = {(record.key, record.generation): record for record in newest_manifest.records} if newest_manifest else {}
    present = {key: known[key, gen] for key, (gen, _) in found.items() if (key, gen) in known}
    missing = [(key, name) for key, (_, name) in found.items() if key not in present]
    with ThreadPoolExecutor(16) as pool:
        read = pool.map(lambda pair: Record.from_json(store.get(pair[1]), pair[1]), missing)
        present.update({key: record for (key, _), record in zip(missing, read, strict=True)})
    return Resolved(stage, whole, actions, present, newest_manifest)


def _newest_manifest(store: Store, whole: Action) -> Manifest | None:
    """The newest manifest of that stage and spec, with keys and generations, as this action's."""
    heads = list(store.list(f"manifests/{whole.place}/"))
    if not heads:
        return None
    name = max(heads, key=lambda entry: (entry.modified, entry.name)).name
    head = document(store, name)
    with explain_damage(name):
        if not store.exists(object_name(head["version"])):
            return None  # the records say it too, and the next run writes it anew
        return Manifest.load(store, head["version"]).asked_as(whole, [(key, number) for key, number in head["records"]])


def unfinished(stages: Iterable[Stage], known: Mapping[str, Manifest], store: Store) -> list[Stage]:
    """Of these ordered stages, those that have work, and those behind them, which will as a rule have some too.

    known: manifests of stages that are done, those that are not among `stages` included.
    """
    done, out = dict(known), []
    for stage in stages:
        if stage.name in done:
            continue
        if all(need in done for need in stage.needs):
            resolved = resolve(stage, [done[need] for need in stage.needs], store)
            if not resolved.todo:
                done[stage.name] = resolved.manifest()
                continue
        out.append(stage)
    return out


def order(stages: Iterable[Stage]) -> list[Stage]:
    """The stages, each behind all that it needs; otherwise in the order given."""
    left, done, out = list(stages), set[str](), []
    while left:
        ready = next((stage for stage in left if done.issuperset(stage.needs)), None)
        if ready is None:
            raise Refused(f"stages need each other in a circle: {', '.join(stage.name for stage in left)}")
        left.remove(ready)
        done.add(ready.name)
        out.append(ready)
    return out


def chosen(stages: Sequence[Stage], until: str | None = None, only: str | None = None) -> set[str]:
    """Names of the stages to run: all; with `until` that group and all that it needs; with `only` that group alone."""
    if until is not None and only is not None:
        raise Refused("--until and --only exclude each other: give one of them.")
    names = {stage.name: stage for stage in stages}
    target = only if until is None else until
    if target is None:
        return set(names)
    groups = list(dict.fromkeys(stage.group for stage in stages))
    picked = {name for name, stage in names.items() if target in (stage.group, name)}
    if not picked:
        near = difflib.get_close_matches(target, groups, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise Refused(f"There is no stage {target!r} in this recipe.{hint} Its stages: {', '.join(groups)}.")
    if only is not None:
        return picked
    queue = list(picked)
    while queue:
        for need in names[queue.pop()].needs:
            if need not in picked:
                picked.add(need)
                queue.append(need)
    return picked


def why(stage: Stage, whole: Action, store: Store) -> str:
    """Why a stage has work: the difference between this action and that of its newest manifest, in words."""
    heads = [entry for entry in store.list("manifests/") if entry.name.startswith(f"manifests/{stage.name}-")]
    heads = [entry for entry in heads if entry.name.split("/")[1].rsplit("-", 1)[0] == stage.name]
    if not heads:
        return "not made yet"
    name = max(heads, key=lambda entry: (entry.modified, entry.name)).name
    before = document(store, name)["action"]
    reasons = []
    if before["stage"] != whole.stage:
        reasons.append(f"stage version {before['stage'].split('/')[-1]} → {whole.stage.split('/')[-1]}")
    reasons += differences(before["spec"], whole.spec)
    for need, old, new in zip(stage.needs, before["inputs"], whole.inputs, strict=False):
        if old != new:
            reasons.append(f"{need} changed")
    if len(before["inputs"]) != len(whole.inputs) or (not stage.needs and before["inputs"] != list(whole.inputs)):
        reasons.append("its inputs changed")
    again = getattr(stage.how, "retry_pass", 0)
    return "; ".join(reasons) or ("failed rows are asked again" if again else "records are missing")


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two JSON documents, as "dotted.path old → new", in path order."""
    if isinstance(old, dict) and isinstance(new, dict):
        out = []
        for key in sorted(old.keys() | new.keys()):
            out += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return out
    if old == new:
        return []
    shown = [text if len(text) <= 40 else text[:37] + "…" for text in (json.dumps(old), json.dumps(new))]
    return [f"{path} {shown[0]} → {shown[1]}"]
