"""The page about a release: complete, adding up, self-contained, and the same bytes for the same inputs."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from infra.records.objects import object_name
from infra.store.opening import open_store
from pipelines.evaluate import scores
from pipelines.promote import ledger as releases
from pipelines.promote.gate import GateSpec
from pipelines.reports.release import parameters
from tests.fixtures.line import STATES, Line


class Text(HTMLParser):
    """What a reader sees, and what a browser would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "br", "img", "link", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Closed where it opens."""

    def handle_data(self, data: str) -> None:
        self.words += data.split()


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """A line with a champion and a report."""
    folder = tmp_path_factory.mktemp("line")
    line = Line(open_store(str(folder / "store")), folder)
    line.judge(line.release([True] * 90 + [False] * 10))
    made = line.judge(line.release([True] * 97 + [False] * 3, steps=4), GateSpec({"single.all": 0.9}))
    line.made = {**made, "report": line.report(made)}
    return line


@pytest.fixture(scope="module")
def page(line: Line) -> str:
    return line.store.get(object_name(line.made["report"].only.sha("report.html"))).decode()


def test_every_row_is_in_one_final_state_and_the_table_adds_up(page: str) -> None:
    table = page[page.index("Final states") : page.index("<h2>Models</h2>")]
    states = re.findall(r'<td>(\w+)</td><td class="n">([\d\u202f]+)</td>', table)
    counted = {(name, int(count.replace("\u202f", ""))) for name, count in states}
    kept = STATES["curate"]["kept"]
    assert ("kept", kept) in counted
    assert sum(count for _, count in counted) == STATES["source"]["listed"]
    assert {name for name, _ in counted} == {
        state for stage in STATES.values() for state in stage if state not in ("listed",)
    }
    assert "adds up" in table
    assert "does not add up" not in table


def test_what_each_rule_took_is_shown_with_its_first_rows(page: str) -> None:
    table = page[page.index("<h3>What each rule took") : page.index("<h3>Final states")]
    words = " ".join(Text(table).words)
    assert "filter caption 4 x 010101010101 filter exact_duplicates 30 said <i>again</i> 000000000000" in words
    assert "curate clip_score 16" in words
    assert table.count("data:image/jpeg;base64,") == 1  # the other's bytes are no picture
    assert "<i>again" not in table


def test_the_page_says_scores_with_intervals_beside_ceiling_and_floor(line: Line, page: str) -> None:
    words = " ".join(Text(page).words)
    assert "single: all right at once 0.970 95 % interval 0.915–0.990" in words
    assert "all 0.970 0.915–0.990 1.000 0.050" in words
    assert "Zero-shot accuracy" in words
    assert "single.all 0.970 0.900 passed" in words
    measured = scores.read(line.store.get(object_name(line.made["evaluate"].only.sha("scores.json"))))
    assert f"CLIP-FD {measured['fd']:.3f} Fréchet distance" in words
    assert f"precision · recall {measured['precision']:.3f} · {measured['recall']:.3f}" in words
    assert "+0.070" in words


def test_the_page_is_whole_loads_nothing_and_escapes_what_strangers_wrote(line: Line, page: str) -> None:
    read = Text(page)
    assert read.open == []
    assert {value.partition(",")[0] for value in read.loads} == {"data:image/png;base64", "data:image/jpeg;base64"}
    assert line.store.uri not in page
    assert "<b>grey" not in page


def test_the_page_names_every_stage_model_and_the_ledgers_entry(line: Line, page: str) -> None:
    words = " ".join(Text(page).words)
    for name in ("source", "download", "clip", "prior", "decoder", "upsampler-32", "upsampler-64", "bundle", "promote"):
        assert f" {name} " in words
    assert line.made["bundle"].version in words
    assert line.head is not None
    assert line.head.digest in words
    assert "unclip generate" in words
    weights = line.made["prior"].only.sha("model.safetensors")
    assert f"{parameters(line.store, weights):,}".replace(",", "\u202f") in page


def test_the_same_inputs_give_the_same_page(line: Line, page: str) -> None:
    (record,) = line.store.list("records/report-1/")
    line.store.delete(record.name)
    again = line.report(line.made)
    assert again.version == line.made["report"].version


def test_a_person_is_told_where_grid_and_report_lie_and_how_to_go_on(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list(releases.summary(line.store, "unclip", line.made, line.store.uri, "http://127.0.0.1:9"))
    paths = [Path(text.split()[1]) for text in said if text.startswith(("grid ", "report "))]
    assert [path.name for path in paths] == ["grid-single.png", "report.html"]
    assert all(path.stat().st_size > 1000 for path in paths)
    text = "\n".join(said)
    assert "not registered now" in text
    for word in ("unclip@champion is", "all right 0.970", "unclip ui --store", "unclip generate", "--out grid.png"):
        assert word in text
