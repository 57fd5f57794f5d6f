"""What README and docs name exists: files, targets, commands, links; and they can be read."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from pipelines.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WIDTH, LENGTH = 100, 200
"""Characters a line, tables and code apart; lines of README.md."""


def name(path: Path) -> str:
    """A page as a person calls it."""
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_path_that_a_page_names_is_there(page: Path) -> None:
    named = re.findall(
        r"(?<![\w/.-])((?:pipelines|training|infra|unclip|tests|docs)/[\w/.-]*\w\.(?:py|md|yaml|sh))", page.read_text()
    )
    assert sorted({path for path in named if not (ROOT / path).exists()}) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_target_that_a_page_names_is_in_the_makefile(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {word.rstrip("-") for word in re.findall(r"`make ([a-z][a-z-]*)", page.read_text())}
    assert {word for word in named - targets if not any(target.startswith(f"{word}-") for target in targets)} == set()


def test_the_commands_page_names_every_command_and_no_other() -> None:
    command = get_command(app)
    groups = command.commands  # type: ignore[attr-defined]
    there = {
        " ".join(filter(None, (first, second)))
        for first, one in groups.items()
        for second in (getattr(one, "commands", None) or [""])
    }
    page = (ROOT / "docs" / "commands.md").read_text()
    named = set(re.findall(r"`unclip ([a-z]+(?: [a-z]+)?)", page))
    assert {one for one in there if not one.startswith("edit")} <= named
    assert {one for one in named if one not in there and one.split()[0] not in groups} == set()
    assert all(f"`{one}`" in page for one in groups["edit"].commands)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_can_be_read(page: Path) -> None:
    lines = page.read_text().splitlines()
    code = [line.startswith("```") for line in lines]
    inside = [sum(code[: number + 1]) % 2 == 1 for number in range(len(lines))]
    long = [line for line, fenced in zip(lines, inside, strict=True) if len(line) > WIDTH and not fenced]
    assert [line for line in long if not line.startswith(("|", "    "))] == []


def test_the_readme_is_short_and_begins_with_what_it_is() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < LENGTH


def test_nothing_names_a_page_that_is_gone() -> None:
    found = subprocess.run(["git", "grep", "-nE", r"docs/[a-z/]+\.md", "--", "*.py", "*.toml", "*.yaml", "Makefile"],
                           cwd=ROOT, capture_output=True, text=True, check=False).stdout  # fmt: skip
    named = set(re.findall(r"docs/[a-z/]+\.md", found))
    assert {page for page in named if not (ROOT / page).exists()} == set()
