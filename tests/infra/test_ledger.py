"""The ledger's promises: append-only, chained, and refused to whom was judged against another head."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from infra.errors import Refused
from infra.ledger import Entry, Ledger
from infra.store.local import LocalStore
from infra.store.opening import open_store


def three_entries(store_uri: str) -> Ledger:
    ledger = Ledger(open_store(store_uri), "line")
    head = None
    for number in range(3):
        head = ledger.append(Entry("promote", f"release {number}", gate=f"gate {number}"), after=head)
    return ledger


def tamper(ledger: Ledger, number: int, old: bytes, new: bytes) -> None:
    """Changes a stored entry, as somebody with access to the store's disk could."""
    assert isinstance(ledger.store, LocalStore)
    path = ledger.store.local(f"ledgers/line/{number:08d}.json")
    data = path.read_bytes()
    assert old in data
    os.chmod(path, 0o644)
    path.write_bytes(data.replace(old, new))


def test_entries_are_chained_and_read_back_as_written(store_uri: str) -> None:
    ledger = Ledger(open_store(store_uri), "line")
    assert ledger.head() is None
    assert ledger.verify() == 0
    first = ledger.append(Entry("promote", "r1", "g1", "good", {"single_all": 0.9}), after=None)
    second = ledger.append(Entry("rollback", "r0", reason="bad"), after=first)
    assert (first.number, first.previous, second.number, second.previous) == (1, "", 2, first.digest)
    assert list(ledger.entries()) == [first, second]
    assert ledger.head() == second
    assert ledger.verify(anchor=first.digest) == ledger.verify(anchor=second.digest) == 2
    assert Ledger.names(ledger.store) == ["line"]


def test_an_entry_judged_against_another_head_is_refused(store_uri: str) -> None:
    ledger = three_entries(store_uri)
    first, second, third = ledger.entries()
    for stale in (None, first, second):
        with pytest.raises(Refused, match="has moved on and is now at entry 3") as refused:
            ledger.append(Entry("promote", "late"), after=stale)
        assert refused.value.code == 4
    assert ledger.head() == third


def test_of_promotions_that_race_just_one_is_entered(store_uri: str) -> None:
    ledger = three_entries(store_uri)
    head, start, entered, turned_down = ledger.head(), threading.Barrier(8), [], []

    def promote(number: int) -> None:
        start.wait()
        try:
            entered.append(ledger.append(Entry("promote", "the same release"), after=head))
        except Refused as refused:
            turned_down.append(refused.code)

    racers = [threading.Thread(target=promote, args=(number,)) for number in range(8)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [ledger.head()] == entered
    assert turned_down == [4] * 7
    assert ledger.verify() == 4


def test_a_changed_entry_breaks_the_chain_where_it_was_changed(tmp_path: Path) -> None:
    ledger = three_entries(str(tmp_path))
    tamper(ledger, 2, b"release 1", b"release 9")
    with pytest.raises(Refused, match=r"entry 3 follows .* entry 2 has .* one of the two was changed"):
        ledger.verify()


def test_a_removed_entry_and_an_unreadable_one_are_named(tmp_path: Path) -> None:
    ledger = three_entries(str(tmp_path))
    tamper(ledger, 2, b"{", b"")
    with pytest.raises(Refused, match="entry 2 cannot be read"):
        ledger.verify()
    ledger.store.delete("ledgers/line/00000002.json")
    with pytest.raises(Refused, match="entry 2 is missing"):
        ledger.verify()


def test_a_cut_off_end_shows_against_an_anchor_outside(tmp_path: Path) -> None:
    ledger = three_entries(str(tmp_path))
    head = ledger.head()
    assert head
    ledger.store.delete("ledgers/line/00000003.json")
    assert ledger.verify() == 2
    with pytest.raises(Refused, match="recorded outside of the store"):
        ledger.verify(anchor=head.digest)


def test_what_is_no_entry_and_no_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="not 'demote'"):
        Entry("demote", "r")
    with pytest.raises(Refused, match="letters, digits"):
        Ledger(LocalStore(tmp_path), "../other")


def test_an_entry_of_a_later_schema_is_refused_with_advice(tmp_path: Path) -> None:
    ledger = three_entries(str(tmp_path))
    tamper(ledger, 3, b'"schema_version":1', b'"schema_version":99')
    with pytest.raises(Refused, match="schema"):
        ledger.head()
