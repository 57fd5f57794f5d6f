from __future__ import annotations

from collections import Counter
from dataclasses import astuple, fields

import pytest

from infra.errors import Refused
from pipelines.shapes import world
from pipelines.shapes.links import FAULTS, HARMLESS, HOSTS, Faults, Link, parse_path, percent_of

LINKS = [Link(0, 30, index) for index in range(6000)]


def test_a_url_says_everything() -> None:
    for link in (Link(0, 30, 0), Link(12, 0, 1_234_567), Link(3, 100, 5, faulty=False)):
        host, _, path = link.url.removeprefix("http://").partition("/")
        assert host in HOSTS
        assert parse_path(f"/{path}") == link


@pytest.mark.parametrize("path", ["/", "/robots.txt", "/seed0-pairs130/000001.png", "/seed0-pairs30/1.png"])
def test_other_paths_name_no_picture(path: str) -> None:
    assert parse_path(path) is None


def test_about_a_tenth_of_the_links_is_bad() -> None:
    harmful = [getattr(FAULTS, field.name) for field in fields(Faults) if field.name not in HARMLESS]
    assert 0.08 <= sum(harmful) <= 0.12
    bad = sum(link.fault is not None and link.fault not in HARMLESS for link in LINKS)
    assert 0.08 <= bad / len(LINKS) <= 0.13


def test_each_fault_has_its_share() -> None:
    counts = Counter(link.fault for link in LINKS)
    for field, share in zip(fields(Faults), astuple(FAULTS), strict=True):
        expected = share * len(LINKS)
        assert abs(counts[field.name] - expected) < 4 * expected**0.5


def test_a_clean_world_has_no_faults() -> None:
    assert all(Link(0, 30, index, faulty=False).fault is None for index in range(2000))


def test_a_duplicate_shows_an_earlier_picture_and_says_so() -> None:
    duplicates = [link for link in LINKS if link.fault == "duplicate"]
    for link in duplicates:
        assert link.shown.index < link.index
        assert link.shown.fault is None
        assert world.parse(link.caption) == link.shown.scene


def test_only_mismatched_captions_are_untrue() -> None:
    for link in LINKS:
        assert (world.parse(link.caption) == link.scene) == (link.fault != "mismatched")


def test_no_link_shows_or_tells_a_held_out_scene() -> None:
    for link in LINKS:
        assert not world.held_out(link.scene)
        assert not world.held_out(world.parse(link.caption))


@pytest.mark.parametrize("pairs", [-0.1, 1.5, 0.333])
def test_a_share_of_pairs_that_no_url_can_hold_is_refused(pairs: float) -> None:
    with pytest.raises(Refused, match="whole percentage"):
        percent_of(pairs)
