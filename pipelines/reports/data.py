"""The data report: one HTML page about the rows of a data set, for people. What came of the list, which hosts served
it, what the pictures and captions are like, what each rule took, what is alike, and a random look at what stays and
goes.

Self-contained and deterministic: equal inputs give equal bytes, so no times and no paths stand in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infra.documents import digest_file
from infra.errors import Refused
from infra.records import KEPT, Action, Manifest, Record, document, read_object
from infra.store import Store
from pipelines.engine import Version, find_version, list_versions
from pipelines.fit import CHAIN, DATA, STEPS
from pipelines.reports.census import ASPECT, SCORES, WIDEST, DatasetStats, Row, count_dataset
from pipelines.reports.charts import Chart, binned, histogram, linear, logarithmic, median_bin
from pipelines.reports.contact import sheet_rows
from pipelines.reports.count import Count
from pipelines.reports.duplicates import COMPARED, groups
from pipelines.reports.page import TEMPLATES, count, render, stage_line
from pipelines.select import ROW_SOURCES
from pipelines.stage import StageBase

TEMPLATE = TEMPLATES / "data.html.j2"
PAGE = "data.html"
OCTAVE = 4
"""Bars of sides a doubling."""
HOSTS = 15
"""Hosts that are named: of the most rows, and of the most that failed."""

Rules = Mapping[str, Sequence[Mapping[str, Any]]]
"""filter and curate → their rules in order, as in a recipe."""


@dataclass(frozen=True)
class DataReport(StageBase):
    """Stage: all data stages → `data.html`."""

    rules: dict[str, Any] = field(default_factory=dict)
    how = None
    name = "data-report"
    group = "curate"
    needs = (*DATA, Count.name)

    @property
    def spec(self) -> dict[str, Any]:
        """The rules, and the template: another one makes another page."""
        return {"rules": self.rules, "template": digest_file(TEMPLATE)}

    def run(self, action: Action, store: Store, out: Path) -> Record:
        made = {
            name: Manifest.load(store, version, name) for name, version in zip(self.needs, action.inputs, strict=True)
        }
        (out / PAGE).write_text(render(TEMPLATE, contents(store, made, self.rules)), encoding="utf-8")
        return Record.of(action, out)


def write(store: Store, ref: str, out: Path) -> tuple[Path, Version]:
    """Writes the page about a version of a data stage, or about a release's data, and returns it with that version.

    ref: first digits of a version, or of a release; "": the newest data, as far down the chain as there is any.
    """
    last = _last(store, ref)
    made, rules = lineage(store, last)
    if "download" not in made:
        raise Refused(f"{last.version[:12]} is a version of {last.stage}, of which there is nothing to be seen yet")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(TEMPLATE, contents(store, made, rules)), encoding="utf-8")
    return out, last


def _last(store: Store, ref: str) -> Version:
    """The version that the page is about: of the furthest stage of the chain."""
    if ref:
        found = find_version(store, ref)
        stage = found.stage.partition("/")[0]
        if stage != "bundle":
            return found
        release = json.loads(read_object(store, Manifest.load(store, found.version).only.sha("release.json")))
        return find_version(store, release["data"]["curate"])
    known = list_versions(store)
    for stage in reversed(CHAIN):
        if newest := next((one for one in known if one.stage.partition("/")[0] == stage), None):
            return newest
    raise Refused(f"there is no data in {store.uri} yet. Make some: unclip run RECIPE --until curate")


def lineage(store: Store, last: Version) -> tuple[dict[str, Manifest], dict[str, Any]]:
    """Stage → manifest of all data stages that a version was made from, itself included; and group → its rules."""
    known = {one.version: one for one in list_versions(store)}
    made: dict[str, Manifest] = {}
    rules: dict[str, Any] = {}
    queue = [last]
    while queue:
        one = queue.pop()
        stage = one.stage.partition("/")[0]
        if stage not in DATA or stage in made:
            continue
        action = document(store, one.head)["action"]
        made[stage] = Manifest.load(store, one.version, stage)
        if stage in ROW_SOURCES:
            rules[stage] = action["spec"]["rules"]
        queue += [known[version] for version in action["inputs"] if version in known]
    if "curate" in made:
        asked = [made[stage].version for stage in Count().needs]
        for one in known.values():
            if one.stage.partition("/")[0] == "data-count" and document(store, one.head)["action"]["inputs"] == asked:
                made["data-count"] = Manifest.load(store, one.version, "data-count")
    return made, rules


def contents(
    store: Store,
    made: Mapping[str, Manifest],
    rules: Rules,
    count_rows: Callable[[Store, Mapping[str, Manifest]], DatasetStats] = count_dataset,
) -> dict[str, Any]:
    """All that the page says. made: the data stages, as far as there are any behind download."""
    counted = count_rows(store, made)
    alike = _alike(store, made, rules, counted)
    rows = [row for some in counted.shown.values() for row in some]
    rows += [row for some in alike.values() for group in some for row in (group.taken, *group.first)]
    pictures = sheet_rows(store, made, rows)

    def shown(some: Sequence[Row]) -> list[dict[str, Any]]:
        return [{**asdict(pictures[row.uid]), "why": row.why} for row in some if row.uid in pictures]

    chain = [stage for stage in CHAIN if stage in made]
    listed = made["source"].rows if "source" in made else made["download"].rows
    return {
        "stage": chain[-1],
        "version": made[chain[-1]].version,
        "listed": listed,
        "steps": _steps(made, rules, listed),
        "cards": _cards(made, listed),
        "reasons": _reasons(made, listed),
        "hosts": _hosts(counted),
        "charts": [asdict(one) for one in _charts(counted) if one is not None],
        "rules": [
            {**one, "rows": shown(counted.shown.get(f"{one['group']}.{one['rule']}", ()))}
            for one in _rules(made, rules)
        ],
        "duplicates": [
            {
                "rule": rule,
                "count": made[group].states.get(rule, 0),
                "groups": [
                    {"alike": one.alike, "taken": shown([one.taken]), "others": shown(one.first)} for one in some
                ],
            }
            for (group, rule), some in alike.items()
        ],
        "sheets": {"kept": shown(counted.shown.get("kept", ())), "rejected": shown(counted.shown.get("rejected", ()))},
        "stages": [stage_line(name, made[name]) for name in chain],
    }


def _alike(
    store: Store, made: Mapping[str, Manifest], rules: Rules, counted: DatasetStats
) -> dict[tuple[str, str], Any]:
    """(group, rule) of each rule about duplicates → what is alike to some of the rows that it took."""
    found = {
        (group, rule["rule"]): groups(store, made[f"{group}-look"], rule, counted.shown[f"{group}.{rule['rule']}"])
        for group in ROW_SOURCES
        for rule in rules.get(group, ())
        if rule["rule"] in COMPARED and f"{group}.{rule['rule']}" in counted.shown and f"{group}-look" in made
    }
    return {which: some for which, some in found.items() if some}


def _cards(made: Mapping[str, Manifest], listed: int) -> list[dict[str, Any]]:
    """How many rows each stage passed on, of those that it was given."""
    cards = [{"title": STEPS[CHAIN[0]], "rows": listed, "share": None, "of": ""}]
    before = listed
    for stage in CHAIN[1:]:
        if stage in made:
            kept = made[stage].states.get(KEPT, 0)
            cards.append({"title": STEPS[stage], "rows": kept, "share": kept / max(before, 1), "of": "of those before"})
            before = kept
    cards[-1]["of"] = f"of those before, {100 * before / max(listed, 1):.1f}\u202f% of the list"
    return cards


def _steps(made: Mapping[str, Manifest], rules: Rules, listed: int) -> list[dict[str, Any]]:
    """The waterfall: rows left behind each step, rule by rule, and how many it took."""
    steps: list[dict[str, Any]] = [{"group": "", "label": STEPS[CHAIN[0]], "left": listed, "lost": 0}]

    def step(group: str, label: str, lost: int) -> None:
        steps.append({"group": group, "label": label, "left": steps[-1]["left"] - lost, "lost": lost})

    for stage in CHAIN[1:]:
        if stage not in made:
            break
        states = made[stage].states
        if stage in ROW_SOURCES:
            for rule in rules.get(stage, ()):
                step(stage, rule["rule"], states.get(rule["rule"], 0))
        else:
            step(stage, "failed" if stage == "download" else "not embedded", steps[-1]["left"] - states.get(KEPT, 0))
    for one in steps:
        one |= {"share": one["left"] / max(listed, 1), "gone": one["lost"] / max(listed, 1)}
    return steps


def _reasons(made: Mapping[str, Manifest], listed: int) -> list[dict[str, Any]]:
    """Why rows were not downloaded or not embedded, the most frequent reason first."""
    found = [
        {"stage": stage, "state": state, "count": rows, "share": rows / max(listed, 1)}
        for stage in ("download", "embed")
        if stage in made
        for state, rows in made[stage].states.items()
        if state != KEPT
    ]
    return sorted(found, key=lambda one: (-one["count"], one["stage"], one["state"]))


def _hosts(counted: DatasetStats) -> dict[str, Any]:
    """The hosts of the most rows, and those of the most that failed; none where pictures came without addresses."""
    table: list[dict[str, Any]] = [
        {
            "host": host,
            "rows": states.total(),
            "kept": states[KEPT],
            "failed": states.total() - states[KEPT],
            "share": states[KEPT] / states.total(),
            "reason": max(((n, state) for state, n in states.items() if state != KEPT), default=(0, ""))[1],
        }
        for host, states in counted.by_host.counts.items()
        if host
    ]
    largest = sorted(table, key=lambda one: (-one["rows"], one["host"]))
    worst = sorted((one for one in table if one["failed"]), key=lambda one: (-one["failed"], one["host"]))
    return {
        "count": len(table),
        "missed": counted.by_host.missed,
        "largest": largest[:HOSTS],
        "worst": worst[:HOSTS] if len(table) > HOSTS else [],
        "most": max((one["rows"] for one in largest[:HOSTS]), default=0),
        "most_failed": max((one["failed"] for one in worst[:HOSTS]), default=0),
    }


def _charts(counted: DatasetStats) -> list[Chart | None]:
    """Sides and aspect on logarithmic axes, lengths of captions and CLIP's score on linear ones."""
    pixels = logarithmic(OCTAVE, lambda value: count(value), unit="\u202fpx")
    side = f"{count(median_bin(counted.sides[0]) or 0)}\u202fpx"
    aspect = logarithmic(ASPECT, _ratio, origin=WIDEST + 0.5)
    score = linear(2 / SCORES, lambda value: f"{value:.2f}".replace("-", "\u2212"), begin=-1.0)
    lengths = linear(1.0, count)
    return [
        histogram("Shorter side of the original", "pixels, logarithmic", binned(counted.sides, OCTAVE), pixels, side),
        histogram("Aspect of the original", "width : height, logarithmic", counted.aspects, aspect),
        histogram("Length of captions", "characters", counted.characters, lengths),
        histogram("Words of captions", "words between spaces", counted.words, lengths),
        histogram("CLIP score", "cosine of picture and caption", counted.scores, score),
    ]


def _ratio(value: float) -> str:
    """2 → "2:1", 0.5 → "1:2"."""
    return f"{value:.3g}:1" if value > 0.999 else f"1:{1 / value:.3g}"


def _rules(made: Mapping[str, Manifest], rules: Rules) -> Iterator[dict[str, Any]]:
    """Each rule with its settings and what it took."""
    for group in (group for group in ROW_SOURCES if group in rules):
        given = made[group].rows
        for rule in rules[group]:
            said = [
                f"{name} {_value(value)}"
                for name, value in rule.items()
                if name not in ("rule", "sha256") and value is not None
            ]
            taken = made[group].states.get(rule["rule"], 0)
            yield {
                "group": group,
                "rule": rule["rule"],
                "settings": ", ".join(said),
                "count": taken,
                "share": taken / max(given, 1),
            }


def _value(value: Any) -> str:
    """A rule's setting, as short as a person wants it."""
    if isinstance(value, (list, tuple)):
        return f"of {len(value)}" if len(value) > 3 else ", ".join(map(str, value))
    return str(value)
