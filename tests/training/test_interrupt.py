"""One cell of the grid of tests/proofs/interrupt.py; `make proof-interrupt` does all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.proofs import interrupt


@pytest.mark.full
@pytest.mark.slow
def test_a_sharded_fit_killed_while_a_checkpoint_is_written_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    assert interrupt.prove(tmp_path, 10, "fsdp-2-checkpoint-kill").startswith("1 of 1 cells: 1 with as many workers")
